"""Problems solved directly, without a training loop."""

from steep._discovery import exports

__getattr__, __dir__ = exports(__name__)
