"""Looking inside a model or a training, without changing it."""
