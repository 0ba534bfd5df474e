"""Backward rules: from a vector of losses to ``.grad``."""
