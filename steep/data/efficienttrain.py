"""EfficientTrain shows a network low frequencies and weak augmentation first, and everything at the end. The low
frequencies of a picture fit into a smaller one, so that early steps are cheaper; no example is ever left out.

    low_frequency_crop: (.., H, H) -> (.., B, B):  real(IFFT2((B/H)^2 F[|k| < B/2 or k = -B/2])),  F = FFT2(x), B even
    "crop":      B/H = 5/7, 6/7, 1 for 60 %, 20 %, 20 % of the epochs; magnitude 0 -> 9, linear over the epochs
    "plusplus":  B/H = 3/7 (2 stages), 5/7 (4), 1 (4), all of equal compute, so a stage lasts (H/B)^2 of its share;
                 magnitude 0..9, one per stage; Lanczos down-sampling instead of the crop

Wang, Yue, Lu, Liu, Zhong, Song, Huang: EfficientTrain (arXiv 2211.09703) and EfficientTrain++ (arXiv 2405.08768).
Ratios, fractions and magnitudes are the papers' (160, 192 and 224 of 224 pixels; 96, 160 and 224).

What differs, and why:
- RandAugment is a small set of our own (see `augment`): two different ones of seven operations an image. Those that
  need 8-bit colours are missing, and so is the noise on the magnitude (mstd 0.5).
- Linear growth of the magnitude is the paper's text; the authors' code rounds it to 1, 3, 5, 7, 9.
- The number of optimizer steps stays what the budget says, and the learning rate follows the user's scheduler over
  steps. The authors' "plusplus" runs let it follow the compute spent.
- Left out: the greedy search that found the schedule, and the replay buffer for slow loaders.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.batches import Data, Loader
from steep.loop.modes import evaluating
from steep.method import Method, Paper, choice, uniform
from steep.recipe import Recipe, Run, deferred
from steep.requires import REQUIREMENTS, UnmetRequirement

RATIOS = {"crop": (5 / 7, 6 / 7, 1.0), "plusplus": (3 / 7,) * 2 + (5 / 7,) * 4 + (1.0,) * 4}
FRACTIONS = (0.6, 0.2, 0.2)


def low_frequency_crop(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, H) with their low frequencies only, on `size` x `size` points (an even number).

    The mean is kept, and so is every wave of less than ``size / 2`` periods; faster ones vanish.

    Raises:
        ValueError: no square floating-point images, or a `size` that is odd or not in [2, H].
    """
    full = _check_size(x, size)
    if size == full:
        return x
    if size % 2:
        raise ValueError(f"size={size} must be even, so that as many frequencies are kept on either side of zero")
    half, spectrum = size // 2, torch.fft.fft2(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
    for dim in (-2, -1):
        spectrum = torch.cat([spectrum.narrow(dim, 0, half), spectrum.narrow(dim, -half, half)], dim)
    return torch.fft.ifft2(spectrum * (size / full) ** 2).real.to(x.dtype)


def lanczos(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, H) scaled down to `size` x `size` with a Lanczos window of three lobes.

    Raises:
        ValueError: no square floating-point images, or a `size` that is not in [2, H].
    """
    full = _check_size(x, size)
    if size == full:
        return x
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * full / size - 0.5
    distance = (torch.arange(full) - centres[:, None]) * size / full  # in pixels of the small image
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    weights = (weights / weights.sum(1, keepdim=True)).to(x)
    return weights @ x.detach() @ weights.T


SHRINK: dict[str, Callable[[Tensor, int], Tensor]] = {"crop": low_frequency_crop, "plusplus": lanczos}

# At magnitude 10: degrees, shear, shear, fractions of the side (as in RandAugment), relative contrast, and brightness
# in standard deviations of the image.
LIMITS = torch.tensor([30.0, 0.3, 0.3, 0.45, 0.45, 0.9, 0.9])


def augment(x: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, H), each changed by two of seven operations, each in a random direction.

    They are rotation, shears, shifts, contrast and brightness, at ``magnitude / 10`` of `LIMITS`. What enters at the
    border is 0, the mean colour of normalised images. Magnitude 0 changes nothing, and draws the same numbers.
    """
    shape = len(x), len(LIMITS)
    chosen = torch.rand(shape, generator=generator).argsort(1) < 2
    directions = 2 * torch.randint(2, shape, generator=generator) - 1
    if magnitude == 0:
        return x
    angle, shear_x, shear_y, shift_x, shift_y, contrast, brightness = (
        (magnitude / 10 * LIMITS * chosen * directions).T[..., None, None, None].to(x)
    )
    x = warp(x, angle.flatten(), torch.cat([shear_x, shear_y], 1), torch.cat([shift_x, shift_y], 1))
    spread, mean = torch.std_mean(x, (1, 2, 3), correction=0, keepdim=True)
    return mean + (1 + contrast) * (x - mean) + brightness * spread


def warp(x: Tensor, degrees: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    """Images (B, C, H, H) with linear interpolation, each rotated counter-clockwise, sheared and shifted.

    Args:
        degrees: (B,). shear: along x and y (B, 2). shift: to the left and up, in sides of the image (B, 2).
    """
    angle, ones = degrees.deg2rad(), torch.ones_like(degrees)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    slant = torch.stack([ones, shear[:, 0].flatten(), shear[:, 1].flatten(), ones], 1).view(-1, 2, 2)
    theta = torch.cat([turn @ slant, 2 * shift.view(-1, 2, 1)], 2)  # the side of an image is 2 long to grid_sample
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


@dataclass(frozen=True)
class Curriculum:
    """Share of the full side, and augmentation magnitude, of every epoch. Build one with `curriculum`."""

    ratios: tuple[float, ...]
    magnitudes: tuple[float, ...]

    def stage(self, epoch: int, full_size: int) -> tuple[int, float]:
        """Side in pixels (rounded to an even number, or `full_size`) and magnitude; the last ones from then on."""
        epoch = min(epoch, len(self.ratios) - 1)
        return even_size(self.ratios[epoch], full_size), self.magnitudes[epoch]

    @property
    def speed_up(self) -> float:
        """Compute at full size over compute with this curriculum, were the cost the number of pixels."""
        return len(self.ratios) / sum(ratio**2 for ratio in self.ratios)


def curriculum(
    epochs: int,
    *,
    variant: str = "crop",
    fractions: Sequence[float] | None = None,
    ratios: Sequence[float] | None = None,
    max_magnitude: float = 9.0,
) -> Curriculum:
    """The curriculum of a training of so many epochs; see `EfficientTrain` for the arguments.

    Example:
        >>> published = curriculum(300)
        >>> [published.stage(epoch, 224)[0] for epoch in (0, 179, 180, 239, 240, 299)]
        [160, 160, 192, 192, 224, 224]
        >>> round(published.speed_up, 5)
        1.53125
    """
    if variant not in RATIOS:
        raise ValueError(f"variant={variant!r} must be one of {sorted(RATIOS)}")
    ratios = tuple(RATIOS[variant] if ratios is None else ratios)
    fractions = _fractions(variant, ratios) if fractions is None else tuple(fractions)
    _check_stages(epochs, fractions, ratios, max_magnitude)
    ends = [math.floor(epochs * part + 1e-9) for part in accumulate(fractions)]
    stages = [sum(epoch >= end for end in ends[:-1]) for epoch in range(epochs)]
    place, last = (range(epochs), epochs - 1) if variant == "crop" else (stages, len(ratios) - 1)
    magnitudes = tuple(max_magnitude * k / max(1, last) for k in place)
    return Curriculum(tuple(ratios[k] for k in stages), magnitudes)


def _fractions(variant: str, ratios: Sequence[float]) -> tuple[float, ...]:
    if variant == "crop":
        return FRACTIONS
    epochs = [1 / ratio**2 for ratio in ratios]  # equal compute
    return tuple(e / sum(epochs) for e in epochs)


def _check_stages(epochs: int, fractions: Sequence[float], ratios: Sequence[float], max_magnitude: float) -> None:
    if not epochs >= 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    if len(fractions) != len(ratios) or not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError(f"ratios={ratios} must lie in (0, 1], one for each of {len(fractions)} fractions")
    if not all(part > 0 for part in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions={fractions} must be positive and sum to 1")
    if not 0 <= max_magnitude <= 10:
        raise ValueError(f"max_magnitude={max_magnitude} must lie in [0, 10]")


def even_size(ratio: float, full_size: int) -> int:
    """`ratio` of the side as an even number of pixels; the side itself at ratio 1."""
    return full_size if ratio == 1 else min(full_size, max(2, 2 * round(ratio * full_size / 2)))


class EfficientTrain:
    """Train on small, low-frequency, weakly augmented images first and on full ones at the end (EfficientTrain).

    Iterates the training loader with every image shrunk and augmented as the epoch demands; wrap the validation
    and test loaders with `held_out`, so that they follow the size. Call `step` once after each optimizer step.
    Random numbers come from torch's generator without advancing it: the order of the examples is what it was.

    Args:
        loader: yields ``(x, y, ...)`` with normalised images x of shape (B, C, H, H).
        total_steps: optimizer steps of the whole training.
        variant: "crop" (arXiv 2211.09703) or "plusplus" (arXiv 2405.08768).
        fractions: share of the epochs of each stage; (0.6, 0.2, 0.2), or stages of equal compute for "plusplus".
        ratios: share of the side of each stage, in (0, 1]; (5/7, 6/7, 1), or ten stages for "plusplus".
        max_magnitude: of the augmentation at the end, in [0, 10]; 9 in both papers, 0 for no augmentation.

    Raises:
        ValueError: an argument out of range, or inputs that are no square floating-point images.

    Paper: arXiv 2211.09703.

    Example:
        >>> import steep
        >>> images = steep.tensor_loader(torch.randn(6, 1, 28, 28), torch.zeros(6), batch_size=3)
        >>> train = EfficientTrain(images, total_steps=10)
        >>> val = train.held_out(images)
        >>> sizes = []
        >>> for epoch in range(5):
        ...     for x, y, index in train:
        ...         train.step()  # after optimizer.step()
        ...     sizes.append((x.shape[-1], next(iter(val))[0].shape[-1]))
        >>> sizes
        [(20, 20), (20, 20), (20, 20), (24, 24), (28, 28)]
    """

    requires = frozenset({"images"})

    def __init__(
        self,
        loader: Loader,
        *,
        total_steps: int,
        variant: str = "crop",
        fractions: Sequence[float] | None = None,
        ratios: Sequence[float] | None = None,
        max_magnitude: float = 9.0,
    ):
        if not total_steps >= 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1")
        epochs, stages = math.ceil(total_steps / len(loader)), {"fractions": fractions, "ratios": ratios}
        self.curriculum = curriculum(epochs, variant=variant, max_magnitude=max_magnitude, **stages)
        self.loader, self.steps, self.shrink = loader, 0, SHRINK[variant]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        random = _own_generator()
        for x, *rest in self.loader:
            size, magnitude = self.curriculum.stage(self.steps // len(self), _side(x))
            yield self.shrink(augment(x, magnitude, random), size), *rest

    def held_out(self, loader: Loader) -> HeldOut:
        """A validation or test loader whose images have the size of the training's last step."""
        return HeldOut(loader, self)

    def step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1
        if hasattr(self.loader, "step"):
            self.loader.step()

    def state_dict(self) -> dict[str, Any]:
        inner = {"loader": self.loader.state_dict()} if hasattr(self.loader, "state_dict") else {}
        return {"steps": self.steps, **inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if "loader" in state:
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        """All else is the loader's: its dataset, its samplers and generators, its feedback."""
        if name == "loader" or name.startswith("__"):  # absent while being unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)


class HeldOut:
    """A validation or test loader that follows the image size of an `EfficientTrain`, without augmentation."""

    def __init__(self, loader: Loader, train: EfficientTrain):
        self.loader, self.train, self.dataset = loader, train, getattr(loader, "dataset", None)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for x, *rest in self.loader:
            done = max(0, self.train.steps - 1) // len(self.train)
            yield self.train.shrink(x, self.train.curriculum.stage(done, _side(x))[0]), *rest

    def check(self, model: nn.Module) -> None:
        """Run the model once at every size that the curriculum will show it.

        Raises:
            UnmetRequirement: it takes the full images, but no smaller ones.
        """
        with evaluating(model), torch.random.fork_rng(devices=[]):
            x = next(iter(self.loader))[0][:2]
            sizes = sorted({even_size(ratio, _side(x)) for ratio in self.train.curriculum.ratios})
            model(x)
            for size in sizes:
                try:
                    model(x[..., :size, :size])
                except Exception as error:
                    raise UnmetRequirement(
                        "EfficientTrain needs square images as inputs and a model that takes them at any size: "
                        f"{type(model).__name__} fails at {size}x{size} ({error}), and the sizes to come are {sizes}. "
                        "Pool before the head, e.g. with nn.AdaptiveAvgPool2d(1), and interpolate position embeddings"
                    ) from error


def _own_generator() -> torch.Generator:
    """A generator seeded by torch's, which is left where it was."""
    copy = torch.Generator()
    copy.set_state(torch.get_rng_state())
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=copy)))


def _side(x: Any) -> int:
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[-1] != x.shape[-2] or not x.is_floating_point():
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"EfficientTrain needs {REQUIREMENTS['images'].what}, got {found}")
    return x.shape[-1]


def _check_size(x: Tensor, size: int) -> int:
    full = _side(x)
    if not 2 <= size <= full:
        raise ValueError(f"size={size} must lie in [2, {full}], the side of the images")
    return full


def _apply(recipe: Recipe, **hyper: Any) -> Recipe:
    def data(generator: torch.Generator) -> Data:
        plain = recipe.data(generator)
        total_steps = recipe.budget.total_steps(len(plain.train))
        if total_steps is None:
            raise ValueError("EfficientTrain needs a horizon: give the budget steps or epochs beside seconds")
        train = EfficientTrain(plain.train, total_steps=total_steps, **hyper)
        test = train.held_out(plain.test) if plain.test is not None else None
        return dataclasses.replace(plain, train=train, val=train.held_out(plain.val), test=test)

    def model(run: Run) -> nn.Module:
        built = recipe.build("model", run)
        if isinstance(run.data.val, HeldOut):  # and not wrapped again by another method
            run.data.val.check(built)
        return built

    return recipe.replace(data=data, model=deferred(model))


method = Method(
    id="efficienttrain",
    paper=Paper(
        "EfficientTrain: Exploring Generalized Curriculum Learning for Training Visual Backbones",
        arxiv="2211.09703",
        year=2023,
    ),
    changes="data",
    make=EfficientTrain,
    apply=_apply,
    search_space={"variant": choice("crop", "plusplus"), "max_magnitude": uniform(0.0, 9.0)},
    test_values={"fractions": (0.2, 0.2, 0.6), "ratios": (0.5, 0.75, 1.0)},
    wraps=True,
    formula="x <- real(IFFT2((B/H)^2 * corners_B(FFT2(augment(x, m))))),  B/H = 5/7, 6/7, 1 for 60, 20, 20 % of epochs",
)
