"""Methods that change the update: optimizers with torch's contract, used like those of `torch.optim`."""

from steep._discovery import exports

__getattr__, __dir__ = exports(__name__)
