"""Methods that own an outer loop around local steps: federated rounds, bilevel problems, task streams."""

from steep._discovery import exports

__getattr__, __dir__ = exports(__name__)
