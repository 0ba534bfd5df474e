"""Whether a classifier's probabilities mean what they say: calibration error and the ranking of its own mistakes."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over bins of equal width (ECE), in [0, 1].

    Confidence is the largest probability. Bin k holds confidences in (k/bins, (k+1)/bins]; each counts by its number
    of examples. The estimate grows with `bins` and shrinks with the number of examples: compare equal settings only.

    Args:
        probabilities: (N, K), rows summing to one.
        labels: classes (N,).
        bins: 15 as in arXiv 1706.04599; other papers use 10.

    Raises:
        ValueError: shapes that do not fit, no examples, rows that are no probabilities, or `bins` below 1.

    Example:
        >>> sure_and_half_right = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> expected_calibration_error(sure_and_half_right, torch.tensor([0, 1]))
        0.5
    """
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    confidence, wrong = _judge(probabilities, labels)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    gaps = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    gaps.index_add_(0, torch.bucketize(confidence, edges[1:-1]), confidence - (1 - wrong))
    return float(gaps.abs().sum() / len(confidence))


def area_under_risk_coverage(probabilities: Tensor, labels: Tensor) -> float:
    """Error rate among the most confident examples, averaged over how many of them are kept (AURC), in [0, 1].

    Low when the mistakes are the least confident answers. Of equally confident examples the order is undefined: the
    value is the mean over all their orders (arXiv 1805.08206 leaves it open).

    Args:
        probabilities: (N, K), rows summing to one.
        labels: classes (N,).

    Raises:
        ValueError: shapes that do not fit, no examples, or rows that are no probabilities.

    Example:
        >>> right_then_wrong = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> area_under_risk_coverage(right_then_wrong, torch.tensor([0, 1]))  # mean of 0/1 and 1/2
        0.25
    """
    confidence, wrong = _judge(probabilities, labels)
    values, group = confidence.unique(return_inverse=True)  # ascending
    sums, sizes = (torch.zeros_like(values).index_add_(0, group, v) for v in (wrong, torch.ones_like(wrong)))
    errors = (sums / sizes)[group][confidence.argsort(descending=True)].cumsum(0)
    return float((errors / torch.arange(1, len(errors) + 1, device=errors.device)).mean())


def _judge(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidences and mistakes (0 or 1), both (N,) in double precision."""
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"probabilities must be (N, K) and labels (N,) with N > 0, got {tuple(probabilities.shape)} "
            f"and {tuple(labels.shape)}"
        )
    sums = probabilities.double().sum(1)
    if not (bool((probabilities >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)):
        raise ValueError("every row of probabilities must be non-negative and sum to one: apply softmax to logits")
    confidence, answer = probabilities.double().max(1)
    return confidence, (answer != labels).double()
