"""Conjugate gradients, Lanczos and Hutchinson's estimators on matrices that are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.linalg import (
    Spectrum,
    cg,
    density,
    hutchinson_diagonal,
    hutchinson_trace,
    lanczos,
    outermost,
    rademacher,
    spectrum,
)

few = settings(max_examples=30, deadline=None, derandomize=True)
F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(eigenvalues, seed=0):
    values = torch.as_tensor(eigenvalues, dtype=F64)
    u = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64, generator=generator(seed)))[0]
    return u * values @ u.T


# ---- conjugate gradients


@few
@given(st.integers(1, 12), st.floats(0, 2), st.integers(0, 99))
def test_cg_solves(n, damping, seed):
    a = matrix(torch.linspace(0.5, 3, n), seed)
    b = torch.randn(n, dtype=F64, generator=generator(seed))
    found = cg(a.mv, b, rtol=1e-12, damping=damping)
    expected = torch.linalg.solve(a + damping * torch.eye(n, dtype=F64), b)
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-10)
    assert found.converged
    assert not found.indefinite
    assert found.iterations <= n + 2


def test_cg_needs_one_product_for_each_distinct_eigenvalue():
    b = torch.randn(20, dtype=F64, generator=generator())
    assert cg(matrix([1.0] * 20).mv, b, rtol=1e-10).iterations == 1
    assert cg(matrix([1.0] * 8 + [2.0] * 7 + [9.0] * 5).mv, b, rtol=1e-10).iterations == 3


def test_an_exact_preconditioner_leaves_one_product():
    a, b = matrix(torch.logspace(-3, 3, 15)), torch.randn(15, dtype=F64, generator=generator())
    inverse = torch.linalg.inv(a)
    found = cg(a.mv, b, rtol=1e-6, preconditioner=inverse.mv)
    assert found.iterations == 1
    torch.testing.assert_close(found.x, inverse @ b, rtol=1e-4, atol=1e-4)
    assert cg(a.mv, b, rtol=1e-6).iterations > 10


def test_cg_minimizes_the_energy_over_the_krylov_space_at_every_step():
    a, b = matrix(torch.linspace(0.1, 4, 9)), torch.randn(9, dtype=F64, generator=generator())
    for k in (1, 2, 4):
        krylov = torch.stack([torch.linalg.matrix_power(a, j) @ b for j in range(k)], 1)
        best = krylov @ torch.linalg.solve(krylov.T @ a @ krylov, krylov.T @ b)
        found = cg(a.mv, b, rtol=0, max_iter=k)
        torch.testing.assert_close(found.x, best, rtol=1e-8, atol=1e-10)
        assert (found.iterations, found.converged) == (k, False)
        assert found.residual == pytest.approx(float((b - a @ found.x).norm()))


def test_where_cg_starts_and_stops():
    a, b = matrix(torch.linspace(1, 4, 9)), torch.randn(9, dtype=F64, generator=generator())
    exact = torch.linalg.solve(a, b)
    assert cg(a.mv, b, x0=exact).iterations == 0
    assert cg(a.mv, torch.zeros(9, dtype=F64)).x.eq(0).all()
    loose = cg(a.mv, b, rtol=0, atol=0.5 * float(b.norm()))
    assert loose.converged
    assert loose.iterations < 4


def test_negative_curvature_ends_cg_with_what_was_found_before():
    a = torch.diag(torch.tensor([4.0, 3.0, -1.0], dtype=F64))
    found = cg(a.mv, torch.tensor([1.0, 1.0, 0.1], dtype=F64))
    assert found.indefinite
    assert not found.converged
    assert found.x.isfinite().all()
    assert cg(a.mv, torch.tensor([1.0, 1.0, 0.1], dtype=F64), damping=2.0).converged


@pytest.mark.parametrize("bad", [{"rtol": -1.0}, {"damping": -0.1}, {"max_iter": 0}, {"atol": float("nan")}])
def test_cg_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        cg(lambda v: v, torch.ones(2), **bad)
    with pytest.raises(ValueError, match=r"b must be a vector, got shape \(2, 1\)"):
        cg(lambda v: v, torch.ones(2, 1))


# ---- Lanczos


@few
@given(st.integers(1, 14), st.integers(0, 99))
def test_as_many_products_as_rows_give_all_eigenpairs(n, seed):
    a = matrix(torch.randn(n, generator=generator(seed), dtype=F64), seed)
    found = lanczos(a.mv, n, n + 3, generator(seed), dtype=F64)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(a), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(n, dtype=F64))
    torch.testing.assert_close(a @ found.vectors, found.vectors * found.values, rtol=1e-7, atol=1e-7)


def test_extreme_eigenvalues_come_first_and_errors_are_bounded_by_the_residuals():
    exact = torch.cat([torch.linspace(-1, 1, 198, dtype=F64), torch.tensor([-5.0, 9.0], dtype=F64)])
    a = matrix(exact)
    found = lanczos(a.mv, 200, 12, generator(), dtype=F64)
    torch.testing.assert_close(found.values[[0, -1]], exact[[-2, -1]], rtol=1e-8, atol=1e-8)
    norms = (a @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, norms, rtol=1e-6, atol=1e-10)
    nearest = (found.values[:, None] - exact).abs().min(1).values
    assert (nearest <= found.residuals + 1e-12).all()


def test_no_copies_of_converged_eigenvalues_in_float32():
    exact = torch.cat([torch.linspace(0, 1, 299, dtype=F64), torch.tensor([1000.0], dtype=F64)])
    a = matrix(exact).float()
    found = lanczos(a.mv, 300, 60, generator())
    assert int((found.values > 500).sum()) == 1
    gap = found.vectors.double().T @ found.vectors.double() - torch.eye(60, dtype=F64)
    assert gap.abs().max() < 1e-5


def test_lanczos_ends_where_the_start_spans_no_more():
    a = matrix([2.0] * 6 + [5.0] * 4)
    found = lanczos(a.mv, 10, 8, generator(), dtype=F64)
    torch.testing.assert_close(found.values, torch.tensor([2.0, 5.0], dtype=F64))
    assert lanczos(lambda v: 0 * v, 5, 4, generator()).values.tolist() == [0.0]
    eigenvector = torch.linalg.eigh(a).eigenvectors[:, -1]
    assert len(lanczos(a.mv, 10, 8, generator(), start=eigenvector).values) == 1


def test_weights_are_a_gauss_quadrature_exact_to_twice_its_size():
    a = matrix(torch.randn(12, dtype=F64, generator=generator()))
    start = torch.randn(12, dtype=F64, generator=generator(1))
    unit, k = start / start.norm(), 4
    found = lanczos(a.mv, 12, k, generator(), start=start)
    for power in range(2 * k):
        exact = unit @ torch.linalg.matrix_power(a, power) @ unit
        torch.testing.assert_close((found.weights * found.values**power).sum(), exact, rtol=1e-8, atol=1e-8)


def test_spectrum_averages_functions_of_the_eigenvalues():
    exact = torch.linspace(0, 2, 150, dtype=F64)
    found = spectrum(matrix(exact).mv, 150, 20, 12, generator(), dtype=F64)
    assert found.weights.sum() == pytest.approx(1.0)
    for f in (torch.exp, torch.sqrt, torch.cos):
        assert (found.weights * f(found.values.clamp(min=0))).sum() == pytest.approx(float(f(exact).mean()), rel=0.03)
    below = float(found.weights[found.values < 1].sum())
    assert below == pytest.approx(0.5, abs=0.06)


def test_density_is_blurred_and_normalized():
    found = Spectrum(torch.tensor([0.0, 3.0], dtype=F64), torch.tensor([0.25, 0.75], dtype=F64))
    grid = torch.linspace(-4, 7, 1101)
    curve = density(found, grid, 0.2)
    assert float(curve.sum() * 0.01) == pytest.approx(1.0, abs=1e-6)
    assert grid[curve.argmax()] == pytest.approx(3.0)
    assert float(curve.max()) == pytest.approx(0.75 / (0.2 * (2 * torch.pi) ** 0.5))


@pytest.mark.parametrize("bad", [{"k": 0}, {"n": 0}])
def test_lanczos_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        lanczos(**({"matvec": lambda v: v, "n": 3, "k": 2, "generator": generator()} | bad))
    with pytest.raises(ValueError, match="must not be zero"):
        lanczos(lambda v: v, 3, 2, generator(), start=torch.zeros(3))
    with pytest.raises(ValueError, match="probes=0"):
        spectrum(lambda v: v, 3, 2, 0, generator())
    with pytest.raises(ValueError, match="width"):
        density(Spectrum(torch.ones(1), torch.ones(1)), torch.ones(1), 0.0)


# ---- Hutchinson


def test_signs_are_signs_and_fair():
    z = rademacher(4000, generator())
    assert set(z.tolist()) == {-1.0, 1.0}
    assert abs(float(z.mean())) < 4 / 4000**0.5
    assert z.dtype == torch.get_default_dtype()
    assert torch.equal(z, rademacher(4000, generator()))


def test_a_diagonal_matrix_is_found_exactly_by_one_sample():
    d = torch.randn(30, generator=generator())
    assert hutchinson_trace(d.mul, 30, 1, generator(3)).value == pytest.approx(float(d.double().sum()))
    torch.testing.assert_close(hutchinson_diagonal(d.mul, 30, 1, generator(3)).value, d.double())


def test_the_mean_over_all_signs_is_exact(monkeypatch):
    a = matrix(torch.randn(5, dtype=F64, generator=generator()))
    signs = iter(2 * [torch.tensor(s, dtype=F64) for s in itertools.product((-1.0, 1.0), repeat=5)])
    monkeypatch.setattr("steep.linalg._hutchinson.rademacher", lambda n, generator, dtype=None: next(signs))
    trace = hutchinson_trace(a.mv, 5, 32, generator())
    assert trace.value == pytest.approx(float(a.trace()))
    off = a - torch.diag(a.diagonal())
    assert float(trace.error) == pytest.approx(float((2 * off.square().sum() / 31) ** 0.5))  # variance 2 |off|²
    torch.testing.assert_close(hutchinson_diagonal(a.mv, 5, 32, generator()).value, a.diagonal())


def test_the_standard_error_is_that_of_the_estimates():
    a = matrix(torch.randn(20, dtype=F64, generator=generator()))
    found = [hutchinson_trace(a.mv, 20, 25, generator(seed), dtype=F64) for seed in range(60)]
    scores = torch.stack([(f.value - a.trace()) / f.error for f in found])
    assert 0.7 < float(scores.square().mean()) < 1.6
    assert abs(float(scores.mean())) < 4 / 60**0.5
    assert hutchinson_trace(a.mv, 20, 1, generator(), dtype=F64).error.isnan()


def test_hutchinson_refuses_no_samples():
    with pytest.raises(ValueError, match="samples=0"):
        hutchinson_trace(lambda v: v, 3, 0, generator())


SPECTRA = {
    "two pairs": [4.0, 4.0, -3.0, -3.0, 1.0, 0.5, 0.2, 0.1],
    "a triple": [2.622, 2.622, 2.622, 2.122, 1.559, 1.0, 0.3, 0.1, 0.05],
    "all equal": [2.0] * 6,
    "low rank": [5.0, -5.0, 3.0, *[0.0] * 20],
    "zero": [0.0] * 5,
    "distinct": [float(i) for i in range(1, 30)],
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_outermost_eigenvalues_are_found_as_often_as_they_occur(values, k):
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator(3), dtype=torch.float64))
    a = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
    found = outermost(lambda v: a @ v, len(a), k, len(a), generator(), dtype=torch.float64)
    expected = sorted(map(abs, values), reverse=True)[:k]
    assert found.values.abs().tolist() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(a @ found.vectors, found.vectors * found.values, rtol=0, atol=1e-8)


def test_residuals_bound_the_errors_of_few_products():
    values = torch.linspace(-1, 1, 60, dtype=torch.float64)
    found = outermost(lambda v: values * v, 60, 2, 12, generator(), dtype=torch.float64)
    true = (values * found.vectors.T).T - found.vectors * found.values
    torch.testing.assert_close(true.norm(dim=0), found.residuals, rtol=1e-6, atol=1e-12)
    assert found.residuals.min() > 1e-6
    assert ((values[:, None] - found.values).abs().min(0).values <= found.residuals).all()


@pytest.mark.parametrize("bad", [{"k": 0}, {"k": 5}, {"products": 1}])
def test_outermost_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        outermost(lambda v: v, 4, generator=generator(), **{"k": 2, "products": 4, **bad})
