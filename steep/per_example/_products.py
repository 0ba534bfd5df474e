"""Products of matrices that the parts share, and which way to an inner product is the shorter one."""

from __future__ import annotations

from torch import Tensor


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Matrix products (B, m, t) by (B, t, n), where each of the shorter one belongs to several of the other."""
    if len(left) == len(right):
        return left @ right
    if len(left) < len(right):
        return matmul(right.mT, left.mT).mT
    # rows that share a factor become one product of more rows, and the shared factor is not repeated
    few = left.reshape(len(right), -1, left.shape[2]) @ right
    return few.view(*left.shape[:2], -1)


def pairwise_is_cheaper(positions: int, outputs: int, inputs: int, batch: int, share: int = 1) -> bool:
    """Whether products of all pairs of positions take fewer operations than the gradients, and their products.

    Args:
        share: number of pairs of rows that share the inner product of their inputs.
    """
    return positions**2 * (outputs + inputs / share) < outputs * inputs * (1 + positions / batch)


def kernel(left: Tensor, right: Tensor, chosen: slice) -> Tensor:
    """Inner products of the positions (B, T, n) of some examples of `left` with those of all of `right`."""
    here = left.double()  # a Gram matrix has the square of the condition number
    there = here if right is left else right.double()
    return here[chosen].flatten(0, 1) @ there.flatten(0, 1).T
