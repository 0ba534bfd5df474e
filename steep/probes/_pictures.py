"""Figures of landscapes and spectra; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from steep.utils.files import write_atomic


def contours(axis: Any, axes: tuple[Tensor, ...], losses: Tensor, levels: int) -> None:
    from matplotlib.colors import LogNorm

    low, high = float(losses.min()), float(losses.max())
    high = high if high > low else low + 1  # matplotlib refuses levels that do not increase
    log = low > 0
    between = np.geomspace(low, high, levels) if log else np.linspace(low, high, levels)
    norm = LogNorm(low, high) if log else None
    found = axis.contourf(*axes, losses.T, levels=between, cmap="viridis", norm=norm, extend="both")
    axis.figure.colorbar(found, ax=axis, format="%.2g")


def figure(draw: Callable[[Any], None], path: str | os.PathLike[str] | None) -> Any:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5, 4), layout="constrained")
    draw(drawn.subplots())
    if path is not None:
        file = io.BytesIO()  # drawn as a whole before a file is touched
        drawn.savefig(file, format=os.fspath(path).rpartition(".")[2], dpi=150)
        write_atomic(path, file.getvalue())
    return drawn
