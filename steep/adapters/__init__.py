"""steep's methods in the trainer you already have: `lightning`, `hf` (Hugging Face Trainer), `accelerate`; and over
several processes: `distributed`. Each is imported only where it is used."""
