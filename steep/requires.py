"""What a method may require of a training run, and for each requirement the test and the remedy.

A method declares `requires` on its class or in its entry. It is checked on the first batch, and the error names what is
missing and the line to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steep.batches import Batch
from steep.splits import Data


@dataclass(frozen=True)
class Facts:
    """The first batch of a run, as far as a requirement can depend on it."""

    model: nn.Module
    data: Data
    batch: Batch


@dataclass(frozen=True)
class Requirement:
    """One thing a method may need: `met` tests it, `remedy` says which line to change."""

    what: str
    remedy: str
    met: Callable[[Facts], bool]


class UnmetRequirement(TypeError):
    """A method was attached to a run that lacks something it requires."""


_BATCH_COUPLING = (nn.modules.batchnorm._BatchNorm,)


def coupling_layers(model: nn.Module) -> list[str]:
    """Names of layers that mix the examples of a batch in training mode (BatchNorm)."""
    return [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _BATCH_COUPLING) and (module.training or not module.track_running_stats)
    ]


def _is_classes(target: Any) -> bool:
    return isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()


def _is_images(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[-1] == x.shape[-2] and x.is_floating_point()


def _yes(facts: Facts) -> bool:
    return True  # offered by every fit; named so that adapters with less can refuse


REQUIREMENTS: dict[str, Requirement] = {
    "losses": Requirement(
        "one loss per example (shape (B,))",
        "return the losses unreduced, e.g. F.cross_entropy(output, target, reduction='none')",
        _yes,  # checked on the loss itself, where its shape is known
    ),
    "closure": Requirement("a closure to re-evaluate the loss", "call optimizer.step(closure)", _yes),
    "model": Requirement("the model itself", "pass the model when the method is built", _yes),
    "tasks": Requirement("a dict of loss vectors, one per task", "return {'task': losses, ...} from the loss", _yes),
    "indices": Requirement(
        "the index of every example in the training set",
        "let the training loader yield (x, y, indices): wrap its dataset in steep.Indexed",
        lambda facts: facts.batch.indices is not None,
    ),
    "val_batch": Requirement(
        "validation data", "give the recipe's Data a non-empty val loader", lambda facts: len(facts.data.val) > 0
    ),
    "independent_examples": Requirement(
        "examples that do not influence each other's outputs",
        "use nn.GroupNorm instead, or put the layers in eval mode (running statistics)",
        lambda facts: not coupling_layers(facts.model),
    ),
    "classes": Requirement(
        "class labels as targets (integers, shape (B,))",
        "use it on a classification task",
        lambda facts: _is_classes(facts.batch.y),
    ),
    "images": Requirement(
        "square images as inputs (floating point, shape (B, C, H, H))",
        "give inputs of that shape, e.g. x.reshape(-1, 1, 8, 8)",
        lambda facts: _is_images(facts.batch.x),
    ),
    "domains": Requirement(
        "the domain of every training example",
        "give the recipe's Data `domains`, integers of shape (N,), and let its loader yield (x, y, indices)",
        lambda facts: facts.data.domains is not None and facts.batch.indices is not None,
    ),
    "clients": Requirement(
        "training data divided among clients",
        "give the recipe's Data a `clients` tuple, e.g. with steep.dirichlet_clients",
        lambda facts: len(facts.data.clients) > 0,
    ),
}


def check_requirements(name: str, requires: Iterable[str], facts: Facts) -> None:
    """Raise `UnmetRequirement` for the first of `requires` that `facts` do not meet."""
    for key in sorted(requires):
        requirement = REQUIREMENTS[key]
        if not requirement.met(facts):
            detail = f" (found {', '.join(coupling_layers(facts.model)[:3])})" if key == "independent_examples" else ""
            raise UnmetRequirement(f"{name} needs {requirement.what}{detail}: {requirement.remedy}")


def check_losses(losses: Tensor, size: int, *, required_by: str | None = None) -> Tensor:
    """Return `losses` if it is one number per example, or 0-d where nothing needs a vector.

    Args:
        losses: what the loss returned.
        size: number of examples in the batch.
        needed_by: name of the method that needs a vector, or `None` when a 0-d loss will do.

    Raises:
        ValueError: wrong shape, wrong length or a loss that is not floating point.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise ValueError(
            f"the loss must return a floating-point tensor, got {getattr(losses, 'dtype', type(losses).__name__)}"
        )
    if losses.ndim == 0:
        if required_by:
            raise ValueError(
                f"{required_by} needs one loss per example (shape ({size},)) but the loss returned a scalar: "
                f"{REQUIREMENTS['losses'].remedy}"
            )
        return losses
    if losses.shape != (size,):
        raise ValueError(
            f"the loss must return one number per example, shape ({size},), but returned {tuple(losses.shape)}: "
            "reduce every other dimension inside the loss, e.g. losses.flatten(1).mean(1)"
        )
    return losses


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """Losses times the weights of their examples, both (B,).

    Raises:
        ValueError: a loss that is not one number per example, or weights that are not.
    """
    if bool((weights < 0).any()):
        raise ValueError(f"the weights of a batch must be at least 0, got {weights.min().item():g}")
    if not isinstance(losses, Tensor) or losses.shape != weights.shape:
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} need one loss per example, shape ({len(weights)},), but the loss "
            f"returned {found}: {REQUIREMENTS['losses'].remedy}"
        )
    return losses * weights.to(losses.dtype)
