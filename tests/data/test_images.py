"""The crop, the Lanczos filter and the augmentation against their definitions, Pillow and SciPy."""

import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image
from some_images import generator, images, pairs_of_operations, warped

from steep.data._images import augment, lanczos, low_frequency_crop


def crop_by_sums(x, size):
    """The crop of one image (H, H) from the definition of the Fourier transform: no FFT, no corners."""
    full, waves = len(x), np.arange(-(size // 2), size // 2)  # -B/2 is kept and has no partner
    forward = np.exp(-2j * np.pi * np.outer(waves, np.arange(full)) / full)
    backward = np.exp(2j * np.pi * np.outer(np.arange(size), waves) / size)
    return ((backward @ (forward @ x @ forward.T) @ backward.T) / full**2).real


# -- the crop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "size"), [(28, 20), (28, 24), (16, 2), (27, 20), (224, 160)])
def test_crop_is_the_truncated_fourier_series_on_a_smaller_grid(side, size):
    x = images(2, 1, side)
    expected = [crop_by_sums(x[i, 0].numpy(), size) for i in range(2)]
    np.testing.assert_allclose(low_frequency_crop(x, size)[:, 0], expected, atol=1e-11)


@pytest.mark.parametrize("shrink", [low_frequency_crop, lanczos])
@pytest.mark.parametrize("side", [27, 28])
def test_full_size_is_the_identity(shrink, side):
    x = images(side=side)
    assert torch.equal(shrink(x, side), x)


@pytest.mark.parametrize("size", range(2, 29, 2))
def test_mean_of_every_channel_is_kept(size):
    x = images()
    torch.testing.assert_close(low_frequency_crop(x, size).mean((2, 3)), x.mean((2, 3)), rtol=0, atol=1e-14)


def wave(side, kx, ky, phase=0.3):
    """cos(2 pi (kx u + ky v) + phase) at the points of a grid on the unit square."""
    u = torch.arange(side, dtype=torch.float64) / side
    return torch.cos(2 * math.pi * (kx * u + ky * u[:, None]) + phase)[None, None]


@pytest.mark.parametrize(("kx", "ky"), [(0, 0), (9, 0), (-9, 9), (3, -7)])
def test_slow_waves_are_sampled_on_the_small_grid(kx, ky):
    torch.testing.assert_close(low_frequency_crop(wave(28, kx, ky), 20), wave(20, kx, ky), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("kx", "ky"), [(11, 0), (0, 14), (2, -11), (13, 13)])
def test_fast_waves_vanish(kx, ky):
    x = images(1, 1)
    assert low_frequency_crop(wave(28, kx, ky), 20).abs().max() < 1e-13
    torch.testing.assert_close(low_frequency_crop(x + wave(28, kx, ky), 20), low_frequency_crop(x, 20))


@pytest.mark.parametrize("shrink", [low_frequency_crop, lanczos])
def test_shrinking_is_linear_and_treats_images_and_channels_alone(shrink):
    x, z = images(seed=1), images(seed=2)
    torch.testing.assert_close(shrink(2 * x - 3 * z, 20), 2 * shrink(x, 20) - 3 * shrink(z, 20))
    torch.testing.assert_close(shrink(x, 20)[1:2, 1:], shrink(x[1:2, 1:], 20))


@pytest.mark.parametrize("shrink", [low_frequency_crop, lanczos])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shrinking_keeps_the_dtype_and_takes_no_gradient(shrink, dtype):
    x = images(dtype=torch.float32).to(dtype).requires_grad_()
    small = shrink(x, 20)
    assert small.dtype == dtype
    assert not small.requires_grad
    torch.testing.assert_close(small, shrink(x.double(), 20).to(dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", [12, 20, 27])
def test_lanczos_is_pillows(size):
    x = images(1, 1, dtype=torch.float32)
    expected = Image.fromarray(x[0, 0].numpy()).resize((size, size), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(lanczos(x, size)[0, 0], np.asarray(expected), atol=2e-6)


@pytest.mark.parametrize("shrink", [low_frequency_crop, lanczos])
@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        (torch.zeros(1, 1, 28, 28), 30, r"size=30 must lie in \[2, 28\]"),
        (torch.zeros(1, 1, 28, 28), 0, r"size=0 must lie in \[2, 28\]"),
        (torch.zeros(1, 1, 28, 20), 20, r"square .* got torch.float32 \(1, 1, 28, 20\)"),
        (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), 20, "floating point.* got torch.uint8"),
        (torch.zeros(28, 28), 20, r"shape \(B, C, H, H\)"),
        ({"pixels": 1}, 20, "got dict"),
    ],
)
def test_images_that_cannot_shrink(shrink, x, size, message):
    with pytest.raises(ValueError, match=message):
        shrink(x, size)


def test_odd_sizes_are_refused_by_the_crop():
    with pytest.raises(ValueError, match="size=21 must be even"):
        low_frequency_crop(images(), 21)


# -- the augmentation -----------------------------------------------------------------------------------------------


def test_warp_by_whole_pixels_and_quarter_turns_moves_pixels():
    x = images(2, 3, 8)
    shifted = warped(x, shift=(2 / 8, 1 / 8))  # what was 2 to the right and 1 below
    torch.testing.assert_close(shifted[..., :7, :6], x[..., 1:, 2:])
    assert shifted[..., 7, :].abs().max() == 0
    torch.testing.assert_close(warped(x, degrees=90), torch.rot90(x, 1, (2, 3)))
    torch.testing.assert_close(warped(x), x)


def test_warp_is_scipys_affine_transform():
    x, angle, shear, shift = images(1, 1, 15), 17.0, (0.2, -0.1), (0.1, -0.05)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = np.array([[c, -s], [s, c]]) @ np.array([[1, shear[0]], [shear[1], 1]])  # acts on (column, row)
    matrix, centre = matrix[::-1, ::-1], np.array([7.0, 7.0])
    offset = centre - matrix @ centre + 15 * np.array(shift[::-1])
    expected = scipy.ndimage.affine_transform(x[0, 0].numpy(), matrix, offset, order=1, mode="grid-constant")
    np.testing.assert_allclose(warped(x, angle, shear, shift)[0, 0], expected, atol=1e-12)


def test_magnitude_zero_changes_nothing_and_draws_as_much():
    x, first, second = images(), generator(), generator()
    assert torch.equal(augment(x, 0, first), x)
    assert not torch.equal(augment(x, 3, second), x)
    assert torch.equal(first.get_state(), second.get_state())


def test_change_grows_with_the_magnitude():
    x = images(64, 1, 16)
    change = [(augment(x, m, generator()) - x).square().mean() for m in (0, 0.5, 1, 2)]
    assert all(b > 1.5 * a for a, b in itertools.pairwise(change))


def test_each_image_gets_one_of_the_pairs_of_operations_all_equally_often():
    n, x = 4200, images(1, 2, 6)
    out = augment(x.expand(n, -1, -1, -1), 4.0, generator())
    candidates = torch.cat(list(pairs_of_operations(x, 4.0)))
    distance, which = torch.cdist(out.flatten(1), candidates.flatten(1)).min(1)
    assert distance.max() < 1e-4
    counts = which.bincount(minlength=84).double()
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_augmentation_is_scaled_to_the_image():
    x = images(400, 1, 8)
    torch.testing.assert_close(augment(5 * x, 9, generator()), 5 * augment(x, 9, generator()))
