"""Methods that change what the model sees, and when: curricula, selection, augmentation, batch size."""

from steep._discovery import exports

__getattr__, __dir__ = exports(__name__)
