"""Looking inside a model or a training run, without changing it."""

from steep._discovery import exports

__getattr__, __dir__ = exports(__name__)
