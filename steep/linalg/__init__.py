"""Matrices that are only known by their products: curvature of a loss, and what can be found out about it.

Products map dicts of tensors by parameter name; solvers and estimators work on flat vectors. `on_vectors` goes from one
to the other.
"""

from steep.linalg._cg import Solution, cg
from steep.linalg._hutchinson import Estimate, hutchinson_diagonal, hutchinson_trace, rademacher
from steep.linalg._lanczos import Eigenpairs, Ritz, Spectrum, density, lanczos, outermost, spectrum
from steep.linalg._products import fisher, fisher_vp, ggn, ggn_vp, hessian, hvp
from steep.linalg._vectors import MatVec, flatten, on_vectors, unflatten

__all__ = [
    "Eigenpairs",
    "Estimate",
    "MatVec",
    "Ritz",
    "Solution",
    "Spectrum",
    "cg",
    "density",
    "fisher",
    "fisher_vp",
    "flatten",
    "ggn",
    "ggn_vp",
    "hessian",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hvp",
    "lanczos",
    "on_vectors",
    "outermost",
    "rademacher",
    "spectrum",
    "unflatten",
]
