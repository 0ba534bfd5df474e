"""steep's methods in the trainer you already use: `lightning`, `hf` (Hugging Face Trainer), `accelerate`; and in
several processes: `distributed`. Import the module you need; each requires only its own library."""
