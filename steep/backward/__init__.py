"""Backward rules: from a vector of losses to ``.grad``."""

from steep._discovery import exports

__getattr__, __dir__ = exports(__name__)
