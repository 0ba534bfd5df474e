"""Methods that change the loss: distillation, self-distillation, robust and structured losses."""

from steep._discovery import exports

__getattr__, __dir__ = exports(__name__)
