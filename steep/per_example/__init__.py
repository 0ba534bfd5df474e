"""Per-example gradients without the B x P matrix: the foundation of every method that treats a loss as a vector."""

from steep.per_example import _attention, _recurrent  # noqa: F401  (register the rules of their layers)
from steep.per_example._embedding import Lookup
from steep.per_example._layers import closed_form
from steep.per_example.autodiff import Blocks
from steep.per_example.convolution import Patches
from steep.per_example.engine import PerExample
from steep.per_example.parts import Dense, Outer, Part, Sliced
from steep.per_example.rows import Rows

__all__ = [
    "Blocks",
    "Dense",
    "Lookup",
    "Outer",
    "Part",
    "Patches",
    "PerExample",
    "Rows",
    "Sliced",
    "closed_form",
]
