"""Methods that change the model: parametrizations, masks, custom backward passes, adapters."""

from steep._discovery import exports

__getattr__, __dir__ = exports(__name__)
