"""Landscapes of losses whose shape is known, spectra of matrices that are known, and directions by their formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from steep.linalg import Spectrum, flatten
from steep.probes.lla import (
    HessianSpectrum,
    Landscape,
    adam_moments,
    adam_step,
    hessian_spectrum,
    hessian_trace,
    landscape,
    normalized,
    random_directions,
    snapshot,
    top_eigenpairs,
    trajectory,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randoms(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Quadratic(nn.Module):
    """½ θᵀ A θ, with θ in two tensors."""

    def __init__(self, a, seed=5):
        super().__init__()
        self.a, n = a, len(a)
        theta = randoms(n, seed=seed)
        self.w, self.b = nn.Parameter(theta[: n - 2].view(2, -1).clone()), nn.Parameter(theta[n - 2 :].clone())

    @property
    def theta(self):
        return torch.cat([self.w.flatten(), self.b])


def half_square(model):
    return model.theta @ model.a @ model.theta / 2


def symmetric(values, seed=3):
    q = torch.linalg.qr(randoms(len(values), len(values), seed=seed)).Q
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


VALUES = [-1.5, -0.2, 0.0, 0.3, 0.7, 1.0, 2.5, 4.0]


def classifier(*widths, seed=0, activation=nn.Tanh):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)).double()
    x, y = randoms(20, 4), torch.arange(20) % 3
    return model, lambda m: F.cross_entropy(m(x), y, reduction="none")


# ---- landscapes


def test_landscape_of_a_quadratic_is_the_parabola():
    a = symmetric(VALUES)
    model = Quadratic(a)
    d1, d2 = random_directions(model, seeded(), normalize="none")
    found = landscape(model, half_square, [d1, d2], steps=5, span=[(-1, 2), (0, 3)])
    u, v, theta = flatten(d1).numpy(), flatten(d2).numpy(), model.theta.detach().numpy()
    np.testing.assert_array_equal(found.axes[0], np.linspace(-1, 2, 5))
    np.testing.assert_array_equal(found.axes[1], np.linspace(0, 3, 5))
    for i, s in enumerate(np.linspace(-1, 2, 5)):
        for j, t in enumerate(np.linspace(0, 3, 5)):
            point = theta + s * u + t * v
            np.testing.assert_allclose(found.losses[i, j], point @ a.numpy() @ point / 2, rtol=1e-12)


def test_center_is_the_models_own_loss_to_the_bit():
    model, loss = classifier()
    expected = loss(model).mean().item()
    found = landscape(model, loss, random_directions(model, seeded()), steps=7)
    assert found.center == expected
    assert found.losses[3, 3] == expected
    assert found.losses.shape == (7, 7)
    assert found.losses.min() < expected < found.losses.max()


def test_a_line_is_the_row_of_a_plane_and_steps_and_span_are_what_they_say():
    model, loss = classifier()
    d1, d2 = random_directions(model, seeded())
    plane = landscape(model, loss, [d1, d2], steps=5, span=2.0)
    line = landscape(model, loss, [d1], steps=5, span=2.0)
    assert torch.equal(line.losses, plane.losses[:, 2])
    assert line.axes[0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert len(landscape(model, loss, [d1], span=2.0).losses) == 41
    assert landscape(model, loss, [d1], steps=3).axes[0].tolist() == [-0.5, 0, 0.5]


def test_a_direction_may_name_some_parameters_only():
    model, loss = classifier()
    found = landscape(model, loss, [{"4.bias": torch.tensor([1.0, 0.0, 0.0])}], steps=3, span=2.0)
    for factor, value in zip((-1, 0, 1), found.losses, strict=True):
        moved = {"4.bias": model[4].bias + factor * torch.tensor([1.0, 0.0, 0.0])}
        x, y = randoms(20, 4), torch.arange(20) % 3
        assert value.item() == pytest.approx(F.cross_entropy(functional_call(model, moved, (x,)), y).item())


def rescaled(model, factor):
    """The same function with a ReLU layer's weights `factor` times as large, and the next layer's as much smaller."""
    other = classifier(activation=nn.ReLU)[0]
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[0].weight *= factor
        other[0].bias *= factor
        other[2].weight /= factor
    return other


@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_filter_normalisation_does_not_see_the_scale_of_relu_layers(factor):
    model, loss = classifier(activation=nn.ReLU)
    other = rescaled(model, factor)
    torch.testing.assert_close(loss(other), loss(model))
    a, b = (landscape(m, loss, random_directions(m, seeded()), steps=5) for m in (model, other))
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-8, atol=0)
    a, b = (landscape(m, loss, random_directions(m, seeded(), normalize="none"), steps=5) for m in (model, other))
    assert (a.losses - b.losses).abs().max() > 0.01


# ---- directions


def test_normalisations_give_the_norms_of_the_weights():
    weights = {"conv": randoms(4, 3, 2, 2), "bias": randoms(4, seed=1), "w": randoms(2, 5, seed=2)}
    direction = {name: randoms(*w.shape, seed=7) for name, w in weights.items()}
    for order in (1, 2):
        found = normalized(direction, weights, "filter", order)
        for name in ("conv", "w"):
            a, b = (t[name].flatten(1).norm(order, dim=1) for t in (found, weights))
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(found["bias"].norm(order), weights["bias"].norm(order))
        found = normalized(direction, weights, "layer", order)
        for name in weights:
            torch.testing.assert_close(found[name].norm(order), weights[name].norm(order))
        assert not torch.allclose(found["w"].norm(dim=1), weights["w"].norm(dim=1))
        found = normalized(direction, weights, "model", order)
        torch.testing.assert_close(flatten(found).norm(order), flatten(weights).norm(order))
        ratio = flatten(found) / flatten(direction)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    found = normalized(direction, weights, "weight")
    assert torch.equal(found["w"], direction["w"] * weights["w"])
    assert torch.equal(normalized(direction, weights, "none")["w"], direction["w"])


def test_normalisation_keeps_the_direction_within_each_filter_and_takes_zeros():
    weights, direction = {"w": randoms(3, 4)}, {"w": randoms(3, 4, seed=1)}
    direction["w"][1] = 0
    found = normalized(direction, weights)["w"]
    assert (found[1] == 0).all()
    cosine = F.cosine_similarity(found, direction["w"])
    torch.testing.assert_close(cosine[[0, 2]], torch.ones(2).double())


def test_random_directions_are_orthogonal_and_of_their_distribution():
    torch.manual_seed(0)
    model = nn.Linear(300, 30)
    before = torch.get_rng_state()
    drawn = random_directions(model, seeded(), count=3, normalize="none")
    assert torch.equal(before, torch.get_rng_state())
    u, v, w = map(flatten, drawn)
    for a, b in ((u, v), (u, w), (v, w)):
        assert abs(float(F.cosine_similarity(a, b, dim=0))) < 1e-5
    assert abs(float(u.mean())) < 4 / len(u) ** 0.5
    assert float(u.std()) == pytest.approx(1, abs=0.03)
    uniform = flatten(random_directions(model, seeded(), count=1, normalize="none", distribution="uniform")[0])
    assert 0 <= uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    again = random_directions(model, seeded(), count=3, normalize="none")
    assert all(torch.equal(flatten(a), flatten(b)) for a, b in zip(drawn, again, strict=True))
    other = random_directions(model, seeded(1), count=1, normalize="none")
    assert not torch.equal(flatten(other[0]), u)


def test_normalisation_and_order_reach_random_directions():
    model, _ = classifier()
    ways = [("none", 2), ("model", 2), ("layer", 2), ("layer", 1), ("filter", 2), ("filter", 1), ("weight", 2)]
    found = [flatten(random_directions(model, seeded(), normalize=how, order=order)[1]) for how, order in ways]
    for i, a in enumerate(found):
        assert all(not torch.allclose(a, b) for b in found[:i])


def test_adams_directions_are_its_moments():
    model, loss = classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).mean().backward()
        optimizer.step()
    m, v = adam_moments(model, optimizer)
    state = optimizer.state[model[2].weight]
    assert torch.equal(m["2.weight"], state["exp_avg"])
    assert torch.equal(v["2.weight"], state["exp_avg_sq"])
    step = adam_step(model, optimizer, eps=1e-3)["2.weight"].numpy()
    np.testing.assert_allclose(step, m["2.weight"].numpy() / (np.sqrt(v["2.weight"].numpy()) + 1e-3), rtol=1e-12)
    line = landscape(model, loss, [adam_step(model, optimizer)], steps=3, span=0.02)
    assert line.losses[0] < line.losses[1] < line.losses[2]  # against it lies lower ground


# ---- trajectories


def walk(model, loss, steps=12):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    snapshots = [snapshot(model)]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).mean().backward()
        optimizer.step()
        snapshots.append(snapshot(model))
    return snapshots


def test_trajectory_is_the_singular_value_decomposition():
    model, loss = classifier()
    snapshots = walk(model, loss)
    found = trajectory(snapshots, count=3)
    moves = np.stack([flatten(s).numpy() - flatten(snapshots[-1]).numpy() for s in snapshots])
    u, s, vt = np.linalg.svd(moves, full_matrices=False)
    np.testing.assert_allclose(found.explained.numpy(), (s**2 / (s**2).sum())[:3], rtol=1e-8)
    for k in range(3):
        d, p = flatten(found.directions[k]).numpy(), found.points[:, k].numpy()
        sign = np.sign(d @ vt[k])
        np.testing.assert_allclose(d, sign * vt[k], atol=1e-8)
        np.testing.assert_allclose(p, sign * u[:, k] * s[k], atol=1e-8)
    basis = torch.stack([flatten(d) for d in found.directions])
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double(), rtol=0, atol=1e-9)


def test_landscape_in_the_plane_of_a_flat_trajectory_passes_through_its_losses():
    model, loss = classifier()
    d1, d2 = random_directions(model, seeded(), normalize="none")
    end = snapshot(model)
    path = [(1.0, 0.5), (0.4, -0.3), (0.2, 0.1), (0.0, 0.0)]
    snapshots = [{n: w + a * d1[n] + b * d2[n] for n, w in end.items()} for a, b in path]
    found = trajectory(snapshots)
    assert found.explained.sum().item() == pytest.approx(1)
    torch.testing.assert_close(found.points[-1], torch.zeros(2).double(), rtol=0, atol=1e-12)
    for point, there in zip(found.points.tolist(), snapshots, strict=True):
        corner = landscape(model, loss, found.directions, steps=2, span=[(p, p + 1) for p in point])
        model_there, _ = classifier()
        model_there.load_state_dict(there)
        assert corner.losses[0, 0].item() == pytest.approx(loss(model_there).mean().item(), rel=1e-9)


# ---- the Hessian


def test_spectrum_of_a_quadratic_is_the_matrixs():
    found = hessian_spectrum(Quadratic(symmetric(VALUES)), half_square, seeded(), steps=8, runs=3)
    for values, weights in found.runs:
        torch.testing.assert_close(values, torch.tensor(VALUES, dtype=torch.float64), rtol=0, atol=1e-8)
        assert weights.sum().item() == pytest.approx(1)
    assert found.mean.weights.sum().item() == pytest.approx(1)
    assert len(found.mean.values) == 24


def test_first_moment_of_a_run_is_the_quotient_of_its_start():
    a = symmetric(VALUES)
    values, weights = hessian_spectrum(Quadratic(a), half_square, seeded(4), steps=3).runs[0]
    signs = (2 * torch.randint(2, (8,), generator=seeded(4)) - 1).double()
    assert (values * weights).sum().item() == pytest.approx(float(signs @ a @ signs / 8))
    assert len(values) == 3


def criteria(values, seed=0, n=0.5):
    return hessian_spectrum(Quadratic(symmetric(values)), half_square, seeded(seed), steps=8).criteria(n)


def test_criteria_of_known_spectra():
    positive = criteria([0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0])
    assert positive.r_e == pytest.approx(0.1)
    assert positive.k_h == positive.negative == 0
    base = criteria(VALUES)
    assert base.r_e == pytest.approx(1.5 / 4)
    scaled = criteria([7 * v for v in VALUES])
    assert scaled.r_e == pytest.approx(base.r_e)
    assert scaled.k_h == pytest.approx(base.k_h, rel=1e-3)
    turned = criteria([-v for v in VALUES])
    assert turned.r_e == pytest.approx(1 / base.r_e)
    assert turned.k_h == pytest.approx(1 / base.k_h, rel=1e-3)


@pytest.mark.parametrize("n", [0.3, 0.5, 0.9])
def test_criteria_by_their_formula(n):
    generator = np.random.default_rng(0)
    runs, ratios, parts = [], [], []
    for _ in range(3):
        values, weights = np.sort(generator.normal(size=9)), generator.random(9)
        weights /= weights.sum()
        runs.append(Spectrum(torch.from_numpy(values), torch.from_numpy(weights)))
        ratios.append(abs(values[0] / values[-1]))
        low = sum(abs(v * w) ** n for v, w in zip(values, weights, strict=True) if v < 0)
        parts.append(low / sum((v * w) ** n for v, w in zip(values, weights, strict=True) if v > 0))
    found = HessianSpectrum(tuple(runs)).criteria(n)
    assert found.r_e == pytest.approx(np.mean(ratios))
    assert found.k_h == pytest.approx(np.mean(parts))
    assert found.negative == pytest.approx(sum(float(w[v < 0].sum()) for v, w in runs) / 3)


def test_without_a_positive_eigenvalue_k_h_is_infinite_and_says_so():
    with pytest.warns(UserWarning, match="no eigenvalue is positive"):
        assert criteria([-float(v) for v in range(1, 9)]).k_h == math.inf


def dense_hessian(model, loss):
    weights = snapshot(model)
    shapes = [w.shape for w in weights.values()]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return loss(self.model).mean()

    def at(flat):
        parts = flat.split([s.numel() for s in shapes])
        named = {f"model.{n}": p.view(s) for (n, p), s in zip(zip(weights, parts, strict=True), shapes, strict=True)}
        return functional_call(Whole(), named, ())

    return torch.autograd.functional.hessian(at, flatten(weights))


def test_eigenpairs_are_those_of_the_dense_hessian_with_their_signs():
    model, loss = classifier()
    dense = dense_hessian(model, loss)
    values, vectors = torch.linalg.eigh(dense)
    order = values.abs().argsort(descending=True)[:4]
    found = top_eigenpairs(model, loss, seeded(), k=4, steps=80)
    torch.testing.assert_close(found.values, values[order], rtol=1e-9, atol=1e-10)
    assert found.residuals.max() < 1e-6
    for direction, expected in zip(found.directions, vectors[:, order].T, strict=True):
        d = flatten(direction)
        assert d.norm().item() == pytest.approx(1)
        assert abs(float(d @ expected)) == pytest.approx(1, abs=1e-8)
    few = top_eigenpairs(model, loss, seeded(), k=2, steps=3)
    assert few.residuals.max() > 1e-4


def test_negative_eigenvalues_are_found_as_such():
    found = top_eigenpairs(Quadratic(symmetric([-9.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 4.0])), half_square, seeded(), k=2)
    assert found.values.tolist() == pytest.approx([-9, 4])


def test_equal_eigenvalues_have_a_direction_each():
    """Least squares with three outputs: every eigenvalue of the inputs' Gram matrix three times."""
    x = randoms(12, 4)
    model = nn.Linear(4, 3, bias=False).double()
    found = top_eigenpairs(model, lambda m: m(x).square().sum(1) / 2, seeded(), k=4)
    values = torch.linalg.eigvalsh(x.T @ x / 12)
    torch.testing.assert_close(found.values, values[[-1, -1, -1, -2]])
    flat = torch.stack([flatten(d) for d in found.directions])
    torch.testing.assert_close(flat @ flat.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)


def test_two_directions_must_span_a_plane():
    model, loss = classifier()
    (d,) = random_directions(model, seeded(), count=1)
    for other in ({n: -2 * t for n, t in d.items()}, {n: 0 * t for n, t in d.items()}):
        with pytest.raises(ValueError, match="lie on one line"):
            landscape(model, loss, [d, other], steps=3)
    with pytest.raises(TypeError, match=r"is a ndarray, not a tensor: use torch\.as_tensor"):
        landscape(model, loss, [{n: t.numpy() for n, t in d.items()}], steps=3)


def test_a_landscape_without_a_finite_loss_is_not_drawn():
    model, _ = classifier()
    (d,) = random_directions(model, seeded(), count=1)
    with pytest.raises(ValueError, match="no loss of this landscape is finite"):
        landscape(model, lambda m: torch.tensor(float("inf")), [d], steps=3).picture()


def test_curvature_of_a_slice_along_an_eigenvector_is_its_eigenvalue():
    model, loss = classifier()
    found = top_eigenpairs(model, loss, seeded(), k=2)
    h = 1e-3
    for value, direction in zip(found.values, found.directions, strict=True):
        low, middle, high = landscape(model, loss, [direction], steps=3, span=2 * h).losses.tolist()
        assert (low - 2 * middle + high) / h**2 == pytest.approx(float(value), rel=1e-4)


def test_trace_is_exact_for_a_diagonal_and_within_its_error_otherwise():
    diagonal = Quadratic(torch.diag(torch.tensor(VALUES, dtype=torch.float64)))
    assert hessian_trace(diagonal, half_square, seeded(), samples=1).value.item() == pytest.approx(sum(VALUES))
    model, loss = classifier()
    exact = float(dense_hessian(model, loss).trace())
    found = hessian_trace(model, loss, seeded(), samples=400)
    assert abs(float(found.value) - exact) < 4 * float(found.error)
    assert float(found.error) < 0.1 * abs(exact)


def test_mean_of_the_spectrum_is_the_trace_within_the_error_of_its_runs():
    model, loss = classifier()
    dense = dense_hessian(model, loss)
    found = hessian_spectrum(model, loss, seeded(), steps=10, runs=60)
    for power in (1, 2):
        means = torch.stack([(run.values**power * run.weights).sum() for run in found.runs])
        exact = torch.linalg.matrix_power(dense, power).trace() / len(dense)
        assert abs(means.mean() - exact) < 4 * means.std() / 60**0.5


def test_frozen_parameters_are_no_part_of_the_hessian():
    model, loss = classifier()
    model[0].requires_grad_(False)
    found = top_eigenpairs(model, loss, seeded(), k=1, steps=60)
    assert set(found.directions[0]) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    torch.testing.assert_close(found.values[0], torch.linalg.eigvalsh(dense_hessian(model, loss))[-1])


# ---- manners


def test_nothing_is_left_behind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2)).double()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2].eval()
    x, state = randoms(9, 4), {k: v.clone() for k, v in model.state_dict().items()}
    modes, numbers = [m.training for m in model.modules()], torch.get_rng_state()
    objects = list(map(id, model.parameters()))

    def loss(m):
        return m(x).square().mean(1)

    directions = random_directions(model, seeded())
    for _ in range(2):
        landscape(model, loss, directions, steps=3)
        hessian_spectrum(model, loss, seeded(), steps=5)
        top_eigenpairs(model, loss, seeded())
        hessian_trace(model, loss, seeded(), samples=2)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert objects == list(map(id, model.parameters()))
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert torch.equal(numbers, torch.get_rng_state())


def test_weights_return_also_when_the_loss_fails():
    model, _ = classifier()
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def loss(m):
        raise RuntimeError("no data")

    for probe in (
        lambda: landscape(model, loss, random_directions(model, seeded()), steps=3),
        lambda: hessian_trace(model, loss, seeded()),
    ):
        with pytest.raises(RuntimeError, match="no data"):
            probe()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert model.training


def test_equal_generators_give_equal_results():
    model, loss = classifier()
    for probe in (
        lambda g: hessian_spectrum(model, loss, g, steps=6, runs=2).mean.values,
        lambda g: top_eigenpairs(model, loss, g, steps=6).values,
        lambda g: hessian_trace(model, loss, g, samples=3).value,
        lambda g: landscape(model, loss, random_directions(model, g), steps=3).losses,
    ):
        assert torch.equal(probe(seeded(1)), probe(seeded(1)))
        assert not torch.equal(probe(seeded(1)), probe(seeded(2)))


# ---- pictures


@pytest.fixture
def plane():
    axis = torch.linspace(-1, 1, 9, dtype=torch.float64)
    return Landscape(0.1 + axis[:, None] ** 2 + 2 * axis**2, (axis, axis), 0.1)


def pixels(path):
    from PIL import Image

    return np.asarray(Image.open(path))


def test_pictures_are_written_whole_and_show_what_is_asked(plane, tmp_path):
    pytest.importorskip("matplotlib")
    line = Landscape(plane.losses[:, 4], plane.axes[:1], 0.1)
    points = torch.tensor([[0.8, 0.7], [0.3, 0.2], [0.0, 0.0]])
    pictures = {
        "plane": lambda p: plane.picture(p),
        "capped": lambda p: plane.picture(p, cap=0.6),
        "levels": lambda p: plane.picture(p, levels=4),
        "path": lambda p: plane.picture(p, points=points),
        "line": lambda p: line.picture(p),
    }
    found = {}
    for name, draw in pictures.items():
        draw(tmp_path / f"{name}.png")
        found[name] = pixels(tmp_path / f"{name}.png")
    assert all(image.std() > 10 for image in found.values())
    assert all((found["plane"] != found[name]).any() for name in found if name != "plane")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.png" for name in pictures)
    plane.picture(tmp_path / "plane.svg")
    assert "<svg" in (tmp_path / "plane.svg").read_text()


def test_a_landscape_is_drawn_the_right_way_round(plane):
    """The first direction is the horizontal one: along it the loss rises less."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    tilted = Landscape(plane.losses + plane.axes[0][:, None], plane.axes, 1.1)
    tilted.draw(axis)
    lowest = min((p for c in axis.collections[:1] for p in c.get_paths() if len(p.vertices)), key=lambda p: 0)
    assert lowest.vertices[:, 0].mean() < -0.2  # the valley is moved along the first direction
    assert abs(lowest.vertices[:, 1].mean()) < 0.05


@pytest.mark.parametrize("change", [lambda t: t - 5, lambda t: torch.where(t > 2, torch.inf, t), lambda t: 0 * t + 1])
def test_negative_infinite_and_constant_losses_can_be_drawn(plane, change):
    pytest.importorskip("matplotlib")
    Landscape(change(plane.losses), plane.axes, 1.0).picture()


def test_the_density_is_drawn_with_its_bumps_where_the_eigenvalues_are():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    spectrum = HessianSpectrum((Spectrum(torch.tensor([-1.0, 2.0]).double(), torch.tensor([0.25, 0.75]).double()),))
    axis = Figure().subplots()
    spectrum.draw(axis, bins=4001, width=0.05)
    grid, heights = axis.lines[0].get_data()
    assert grid[np.argmax(heights)] == pytest.approx(2, abs=0.01)
    assert max(heights) == pytest.approx(0.75 / (0.05 * math.sqrt(2 * math.pi)), rel=1e-3)
    spectrum.draw(axis)
    assert len(axis.lines[1].get_xdata()) == 2000
    assert max(axis.lines[1].get_ydata()) > 5 * max(heights)  # the default is narrower


# ---- bad input

MODEL, LOSS = classifier()
LINE = random_directions(MODEL, seeded(), count=1)
SPECTRUM = HessianSpectrum((Spectrum(torch.ones(1), torch.ones(1)),))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: landscape(MODEL, LOSS, []), "number of directions=0 must be 1 or 2"),
        (lambda: landscape(MODEL, LOSS, LINE * 3), "number of directions=3 must be 1 or 2"),
        (lambda: landscape(MODEL, LOSS, LINE, steps=1), "steps=1 must lie in [2, inf)"),
        (lambda: landscape(MODEL, LOSS, LINE, span=0.0), "must be a positive number, or 1 (low, high)"),
        (lambda: landscape(MODEL, LOSS, LINE, span=math.nan), "must be a positive number"),
        (lambda: landscape(MODEL, LOSS, LINE, span=[(0, 1), (0, 1)]), "or 1 (low, high) with low < high"),
        (lambda: landscape(MODEL, LOSS, LINE, span=[(1, 0)]), "low < high"),
        (lambda: landscape(MODEL, LOSS, [{"5.bias": torch.ones(3)}]), "the model has no such parameter"),
        (lambda: landscape(MODEL, LOSS, [{"4.bias": torch.ones(4)}]), "of shape (4,), but the model has (3,)"),
        (lambda: landscape(MODEL, LOSS, [{}]), "must name at least one parameter"),
        (
            lambda: normalized({}, {}, "filters"),
            "normalize='filters' must be one of none, model, layer, filter, weight",
        ),
        (lambda: normalized({}, {}, order=0.5), "order=0.5 must lie in [1, inf)"),
        (lambda: random_directions(MODEL, seeded(), count=0), "count=0 must lie in [1, inf)"),
        (
            lambda: random_directions(MODEL, seeded(), distribution="cauchy"),
            "distribution='cauchy' must be 'normal' or",
        ),
        (lambda: adam_moments(MODEL, torch.optim.SGD(MODEL.parameters())), "SGD holds no exp_avg and exp_avg_sq of 0."),
        (lambda: adam_moments(MODEL, torch.optim.Adam(MODEL.parameters())), "give an Adam that has stepped"),
        (lambda: adam_step(MODEL, torch.optim.Adam(MODEL.parameters()), eps=0), "eps=0 must lie in (0, inf)"),
        (lambda: trajectory([snapshot(MODEL)] * 2), "number of snapshots=2 must be more than count=2"),
        (lambda: trajectory([snapshot(MODEL)] * 4), "the snapshots span fewer than count=2 directions"),
        (lambda: trajectory([], 0), "count=0 must lie in [1, inf)"),
        (lambda: top_eigenpairs(MODEL, LOSS, seeded(), k=0), "k=0 must lie in [1, inf)"),
        (lambda: top_eigenpairs(MODEL, LOSS, seeded(), k=5, steps=4), "steps=4 must lie in [5, inf)"),
        (lambda: top_eigenpairs(nn.Linear(1, 1), lambda m: m.weight.sum(), seeded(), k=3), "number of parameters, 2"),
        (lambda: hessian_spectrum(MODEL, LOSS, seeded(), runs=0), "runs=0 must lie in [1, inf)"),
        (lambda: hessian_spectrum(MODEL, LOSS, seeded(), steps=0), "steps=0 must lie in [1, inf)"),
        (lambda: hessian_trace(MODEL, LOSS, seeded(), samples=0), "samples=0 must lie in [1, inf)"),
        (lambda: hessian_trace(nn.ReLU(), LOSS, seeded()), "no parameter that trains"),
        (lambda: SPECTRUM.criteria(1.0), "n=1.0 must lie in (0, 1)"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
