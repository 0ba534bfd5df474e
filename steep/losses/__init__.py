"""Methods that change the loss: distillation, self-distillation, robust and structured losses."""
