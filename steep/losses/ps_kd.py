"""PS-KD softens each example's one-hot target with the model's own prediction of the epoch before, and trusts that
prediction more as training proceeds. It costs no extra forward pass, only the memory of the predictions.

    target = onehot(y) + a_t (P_{t-1}[i] - onehot(y))          (B, K)      a_t = alpha_T * t / T,  t = 1..T
    loss   = - sum_k target_k log softmax(z)_k                 (B,)
    P_t[i] = softmax(z)                                        (N, K), in training mode, without gradient

Kim, Ji, Yoon, Hwang: Self-Knowledge Distillation with Progressive Refinement of Targets (arXiv 2006.12000).
alpha_T = 0.8 is the paper's. So is the absence of a temperature.

What differs, and why:
- Two memories: P_{t-1}, which is read, and P_t, which is written and replaces it at the end of the epoch. The authors'
  code keeps one and writes each row after reading it, which is the same where an epoch visits every example once.
  With two, a closure that evaluates a batch again and sampling with replacement still see the epoch before.
- An example without a prediction keeps its one-hot target (the authors' code leaves a zero row, hence targets that do
  not sum to one, for what the first epoch's loader dropped).
- Left out: targets per token for sequence models, and the paper's variant that keeps the last epoch's weights and
  runs a second forward pass instead of a memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.method import Method, Paper, uniform
from steep.utils.validation import check_ranges, require_whole


class PSKD(nn.Module):
    """Cross-entropy with targets softened by the model's own predictions of the previous epoch (PS-KD).

    Call `step` once after each optimizer step. In evaluation mode, or without gradients and `indices`, it is the
    ordinary cross-entropy. Rows of the memory are written only while gradients are on, and only with finite numbers.
    The memories take shape (N, K) each and appear with the first batch, which shows K.

    Args:
        num_examples: N, number of training examples.
        total_steps: optimizer steps of the whole training run.
        steps_per_epoch: optimizer steps in one pass over the training data; the weight is constant within an epoch.
        alpha_T: weight of the previous prediction in the last epoch, in [0, 1]. 0.8 is the paper's; 0 is cross-entropy.

    Raises:
        ValueError: an argument, a class or an index out of its range, or shapes that are not (B, K), (B,) and (B,).
        TypeError: no `indices` while training.

    Paper: arXiv 2006.12000.

    Example:
        >>> model, x = nn.Linear(5, 3), torch.randn(4, 5)
        >>> y, indices = torch.tensor([0, 2, 1, 0]), torch.arange(4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss = PSKD(num_examples=4, total_steps=10, steps_per_epoch=1)
        >>> for epoch in range(10):
        ...     optimizer.zero_grad()
        ...     losses = loss(model(x), y, indices=indices)
        ...     losses.mean().backward()
        ...     optimizer.step()
        ...     loss.step()
        >>> losses.shape, f"{loss.alpha:.2f}"
        (torch.Size([4]), '0.80')
    """

    requires = frozenset({"indices", "classes"})
    previous: Tensor
    current: Tensor

    def __init__(self, num_examples: int, *, total_steps: int, steps_per_epoch: int, alpha_T: float = 0.8):
        super().__init__()
        sizes = {"num_examples": num_examples, "total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        for name, value in sizes.items():
            require_whole(name, value, 1)
        check_ranges({"alpha_T": alpha_T}, {"alpha_T": "[0, 1]"})
        self.num_examples, self.steps_per_epoch, self.alpha_T = num_examples, steps_per_epoch, alpha_T
        self.epochs, self.steps = math.ceil(total_steps / steps_per_epoch), 0
        for name in ("previous", "current"):
            self.register_buffer(name, torch.zeros(num_examples, 0))  # a row of zeros: no prediction yet

    @property
    def alpha(self) -> float:
        """Weight of the previous prediction in the present epoch."""
        epoch = min(self.steps // self.steps_per_epoch + 1, self.epochs)
        return self.alpha_T * epoch / self.epochs

    def forward(self, output: Tensor, target: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Losses (B,) of logits `output` (B, K), classes `target` (B,) and positions in the training set (B,)."""
        _check_classes(output, target)
        if not self.training or (indices is None and not torch.is_grad_enabled()):
            return F.cross_entropy(output, target, reduction="none")
        rows = self._rows(indices, output)
        softened = self.targets(target, rows)
        if torch.is_grad_enabled():
            self._remember(rows, output.detach())
        return F.cross_entropy(output, softened.to(output.dtype), reduction="none")

    def targets(self, target: Tensor, indices: Tensor) -> Tensor:
        """Softened targets (B, K), rows that sum to one."""
        predicted = self.previous[indices]
        # a row of zeros is an example without a prediction: it keeps its one-hot target
        onehot = F.one_hot(target, predicted.shape[1]).to(predicted.dtype)
        return torch.lerp(onehot, torch.where(predicted.any(1, keepdim=True), predicted, onehot), self.alpha)

    @torch.no_grad()
    def step(self) -> None:
        """Count an optimizer step; at the end of an epoch its predictions become the previous ones."""
        self.steps += 1
        if self.steps % self.steps_per_epoch == 0:
            self.previous.copy_(self.current)

    def _remember(self, rows: Tensor, output: Tensor) -> None:
        predicted = output.to(self.current.dtype).softmax(1)
        # one diverged step must not poison the targets of a whole epoch
        finite = predicted.isfinite().all(1)
        self.current[rows[finite]] = predicted[finite]

    def _rows(self, indices: Tensor | None, output: Tensor) -> Tensor:
        """The indices, checked, with memories of K columns behind them."""
        if indices is None:
            raise TypeError(
                "PSKD needs loss(output, target, indices=...) while training: positions in the training set"
            )
        if indices.shape != output.shape[:1] or indices.is_floating_point():
            raise ValueError(f"indices must be integers of shape ({len(output)},), got {tuple(indices.shape)}")
        _check_range("indices", indices, self.num_examples)
        if self.previous.shape[1] == 0:
            self._allocate(output.shape[1], torch.promote_types(output.dtype, torch.float32), output.device)
        elif self.previous.shape[1] != output.shape[1]:
            raise ValueError(f"output has {output.shape[1]} classes, but {self.previous.shape[1]} in earlier batches")
        return indices.to(self.previous.device)

    def _allocate(self, classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.previous = torch.zeros(self.num_examples, classes, dtype=dtype, device=device)
        self.current = torch.zeros_like(self.previous)

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}previous")
        if saved is not None and len(saved) == self.num_examples:  # K and the dtype are known from the first batch on
            self._allocate(saved.shape[1], saved.dtype, self.previous.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"num_examples={self.num_examples}, epochs={self.epochs}, alpha_T={self.alpha_T}"


def _check_classes(output: Tensor, target: Tensor) -> None:
    if output.ndim != 2 or target.shape != output.shape[:1] or target.is_floating_point():
        raise ValueError(
            "PSKD needs logits of shape (B, K) and integer classes of shape (B,), "
            f"got {tuple(output.shape)} and {target.dtype} {tuple(target.shape)}"
        )
    _check_range("target", target, output.shape[1])


def _check_range(name: str, values: Tensor, end: int) -> None:
    if len(values) and (values.min() < 0 or values.max() >= end):
        raise ValueError(f"{name} must lie in [0, {end - 1}], got {values.min()} to {values.max()}")


method = Method(
    id="ps-kd",
    paper=Paper("Self-Knowledge Distillation with Progressive Refinement of Targets", arxiv="2006.12000", year=2020),
    changes="losses",
    good_for={"better"},
    make=PSKD,
    search_space={"alpha_T": uniform(0.3, 1.0)},
    formula="target = (1 - a_t) onehot(y) + a_t P_{t-1}[i],  a_t = alpha_T t/T;  loss = -sum_k target_k log p_k",
)
