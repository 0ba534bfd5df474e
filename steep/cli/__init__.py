"""The command line: ``steep list | show | fit | compare | resume | runs | report | claims``."""

from steep.cli import catalog, comparing, training  # noqa: F401  (each registers its commands)
from steep.cli._app import app, main

__all__ = ["app", "main"]
