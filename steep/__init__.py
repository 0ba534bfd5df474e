"""steep: the training methods of the literature, and the evidence whether they help on your model."""

from typing import TYPE_CHECKING, Any

from steep.batches import Batch, Data, Indexed, dirichlet_clients, split_loaders, tensor_loader
from steep.card import Card, Choice, Paper, Range, UnknownName, card, cards, choice, integer, log_uniform, uniform
from steep.checkpoint import CheckpointError
from steep.eval_weights import eval_weights
from steep.fit import Result, fit
from steep.needs import UnmetNeed
from steep.recipe import Budget, Mean, Metric, Recipe, Run, accuracy, compose, late
from steep.roles import param_roles
from steep.saver import Interrupted
from steep.tasks import task
from steep.tracking import Log
from steep.training import NonFinite

if TYPE_CHECKING:
    from steep.evidence.compare import compare

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Budget",
    "Card",
    "CheckpointError",
    "Choice",
    "Data",
    "Indexed",
    "Interrupted",
    "Log",
    "Mean",
    "Metric",
    "NonFinite",
    "Paper",
    "Range",
    "Recipe",
    "Result",
    "Run",
    "UnknownName",
    "UnmetNeed",
    "accuracy",
    "card",
    "cards",
    "choice",
    "compare",
    "compose",
    "dirichlet_clients",
    "eval_weights",
    "fit",
    "integer",
    "late",
    "log_uniform",
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
