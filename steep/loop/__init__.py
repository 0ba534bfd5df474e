"""What `fit` is made of: one run's parts and one step of them, checkpoints, scoring, trackers, the terminal."""
