"""steep: published training methods for PyTorch, and statistics on whether they help on your model."""

from typing import TYPE_CHECKING, Any

from steep.batches import Batch, Indexed, adapt, as_batch
from steep.fit import Result, fit
from steep.loop.checkpoint import CheckpointError
from steep.loop.eval_weights import eval_weights
from steep.loop.saver import Interrupted
from steep.loop.tracking import Log
from steep.loop.training import NonFinite
from steep.method import (
    Choice,
    Method,
    Paper,
    Range,
    UnknownName,
    choice,
    integer,
    log_uniform,
    method,
    methods,
    uniform,
)
from steep.recipe import Budget, EarlyStopping, Mean, Metric, Recipe, Run, accuracy, compose, deferred
from steep.requires import UnmetRequirement
from steep.roles import param_groups, param_roles
from steep.splits import Data, dirichlet_clients, split_loaders, tensor_loader
from steep.tasks import task
from steep.version import __version__

if TYPE_CHECKING:
    from steep.evidence.compare import compare

__all__ = [
    "Batch",
    "Budget",
    "CheckpointError",
    "Choice",
    "Data",
    "EarlyStopping",
    "Indexed",
    "Interrupted",
    "Log",
    "Mean",
    "Method",
    "Metric",
    "NonFinite",
    "Paper",
    "Range",
    "Recipe",
    "Result",
    "Run",
    "UnknownName",
    "UnmetRequirement",
    "__version__",
    "accuracy",
    "adapt",
    "as_batch",
    "choice",
    "compare",
    "compose",
    "deferred",
    "dirichlet_clients",
    "eval_weights",
    "fit",
    "integer",
    "log_uniform",
    "method",
    "methods",
    "param_groups",
    "param_roles",
    "split_loaders",
    "task",
    "tensor_loader",
    "uniform",
]


def __getattr__(name: str) -> Any:
    """`compare` is imported when first used: Optuna and Plotly take a second that a plain loop need not pay."""
    if name == "compare":
        from steep.evidence.compare import compare

        return compare
    raise AttributeError(f"module 'steep' has no attribute {name!r}")
