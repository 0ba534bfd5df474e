"""Problems solved directly, without a training loop."""
