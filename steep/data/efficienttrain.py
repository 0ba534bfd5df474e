"""EfficientTrain shows a network low frequencies and weak augmentation first, and the full images at the end. The low
frequencies of an image fit into a smaller one, so early steps are cheaper; every example is shown in every epoch.

    low_frequency_crop: (.., H, H) -> (.., B, B):  real(IFFT2((B/H)^2 F[|k| < B/2 or k = -B/2])),  F = FFT2(x), B even
    "crop":      B/H = 5/7, 6/7, 1 for 60 %, 20 %, 20 % of the epochs; magnitude 0 -> 9, linear over the epochs
    "plusplus":  B/H = 3/7 (2 stages), 5/7 (4), 1 (4), all of equal compute, so a stage lasts (H/B)^2 of its share;
                 magnitude 0..9, one per stage; Lanczos down-sampling instead of the crop

Wang, Yue, Lu, Liu, Zhong, Song, Huang: EfficientTrain (arXiv 2211.09703) and EfficientTrain++ (arXiv 2405.08768).
Ratios, fractions and magnitudes are the papers' (160, 192 and 224 of 224 pixels; 96, 160 and 224).

What differs, and why:
- RandAugment is a small set of our own (`augment` in `_images.py`): two different operations of seven per image. Those
  that need 8-bit colours are missing, and so is the noise on the magnitude (mstd 0.5).
- Linear growth of the magnitude is the paper's text; the authors' code rounds it to 1, 3, 5, 7, 9.
- The budget alone sets the number of optimizer steps, and the learning rate follows the user's scheduler over steps.
  In the authors' "plusplus" runs it follows the compute spent.
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
from torch import Tensor, nn

from steep.batches import as_batch, with_inputs
from steep.data._images import augment, even_size, lanczos, low_frequency_crop, side
from steep.loop.modes import evaluating
from steep.method import Method, Paper, choice, uniform
from steep.recipe import Recipe, Run, deferred
from steep.requires import UnmetRequirement
from steep.splits import Data, Loader
from steep.utils.loaders import LoaderWrapper

_RATIOS = {"crop": (5 / 7, 6 / 7, 1.0), "plusplus": (3 / 7,) * 2 + (5 / 7,) * 4 + (1.0,) * 4}
_FRACTIONS = (0.6, 0.2, 0.2)
_SHRINK: dict[str, Callable[[Tensor, int], Tensor]] = {"crop": low_frequency_crop, "plusplus": lanczos}


@dataclass(frozen=True)
class _Curriculum:
    """Share of the full side, and augmentation magnitude, of every epoch."""

    ratios: tuple[float, ...]
    magnitudes: tuple[float, ...]

    def stage(self, epoch: int, full_size: int) -> tuple[int, float]:
        """Side in pixels (an even number, or `full_size`) and magnitude; after the last epoch, those of the last."""
        epoch = min(epoch, len(self.ratios) - 1)
        return even_size(self.ratios[epoch], full_size), self.magnitudes[epoch]

    @property
    def speed_up(self) -> float:
        """Compute at full size over compute with this curriculum, if the cost is the number of pixels."""
        return len(self.ratios) / sum(ratio**2 for ratio in self.ratios)


def curriculum(
    epochs: int,
    *,
    variant: str = "crop",
    fractions: Sequence[float] | None = None,
    ratios: Sequence[float] | None = None,
    max_magnitude: float = 9.0,
) -> _Curriculum:
    """The curriculum of a training run of `epochs` epochs; see `EfficientTrain` for the other arguments.

    Example:
        >>> published = curriculum(300)
        >>> [published.stage(epoch, 224)[0] for epoch in (0, 179, 180, 239, 240, 299)]
        [160, 160, 192, 192, 224, 224]
        >>> round(published.speed_up, 5)
        1.53125
    """
    if variant not in _RATIOS:
        raise ValueError(f"variant={variant!r} must be one of {sorted(_RATIOS)}")
    ratios = tuple(_RATIOS[variant] if ratios is None else ratios)
    fractions = _fractions(variant, ratios) if fractions is None else tuple(fractions)
    _check_stages(epochs, fractions, ratios, max_magnitude)
    # 1e-9: rounding in the sums (0.7 + 0.1 < 0.8) must not cost a stage its last epoch
    ends = [math.floor(epochs * part + 1e-9) for part in accumulate(fractions)]
    stages = [sum(epoch >= end for end in ends[:-1]) for epoch in range(epochs)]
    place, last = (range(epochs), epochs - 1) if variant == "crop" else (stages, len(ratios) - 1)
    magnitudes = tuple(max_magnitude * k / max(1, last) for k in place)
    return _Curriculum(tuple(ratios[k] for k in stages), magnitudes)


def _fractions(variant: str, ratios: Sequence[float]) -> tuple[float, ...]:
    if variant == "crop":
        return _FRACTIONS
    epochs = [1 / ratio**2 for ratio in ratios]  # stages of equal compute, which an epoch spends on ratio**2 pixels
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


class EfficientTrain(LoaderWrapper):
    """Train on small, low-frequency, weakly augmented images first and on full ones at the end (EfficientTrain).

    Iterates the training loader with every image shrunk and augmented as the epoch requires; wrap the validation and
    test loaders with `held_out`, so that they follow the size. Call `step` once after each optimizer step. The
    augmentation is seeded by torch's generator without advancing it, so the order of the examples does not change.

    Args:
        loader: yields batches (see `steep.as_batch`) with normalised images x of shape (B, C, H, H).
        total_steps: optimizer steps of the whole training run.
        variant: "crop" (arXiv 2211.09703) or "plusplus" (arXiv 2405.08768).
        fractions: share of the epochs of each stage; (0.6, 0.2, 0.2), or stages of equal compute for "plusplus".
        ratios: share of the side of each stage, in (0, 1]; (5/7, 6/7, 1), or ten stages for "plusplus".
        max_magnitude: of the augmentation at the end, in [0, 10]; 9 in both papers, 0 for no augmentation.

    Raises:
        ValueError: an argument out of range, or inputs that are not square floating-point images.

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
        super().__init__(loader)
        self.steps, self.shrink = 0, _SHRINK[variant]

    def __iter__(self) -> Iterator[Any]:
        random = _own_generator()  # seeded again each epoch, before the loader draws its order
        for item in self.loader:
            x = as_batch(item).x
            size, magnitude = self.curriculum.stage(self.steps // len(self), side(x))
            yield with_inputs(item, self.shrink(augment(x, magnitude, random), size))

    def held_out(self, loader: Loader) -> _HeldOut:
        """A validation or test loader whose images have the size of the last training step."""
        return _HeldOut(loader, self)

    def step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1
        if hasattr(self.loader, "step"):
            self.loader.step()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **self.inner_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.load_inner_state(state)


class _HeldOut:
    """A validation or test loader that follows the image size of an `EfficientTrain`, without augmentation."""

    def __init__(self, loader: Loader, train: EfficientTrain):
        self.loader, self.train, self.dataset = loader, train, getattr(loader, "dataset", None)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for item in self.loader:
            x = as_batch(item).x
            # of the last step taken: after an epoch the model has not yet seen the next epoch's size
            done = max(0, self.train.steps - 1) // len(self.train)
            yield with_inputs(item, self.train.shrink(x, self.train.curriculum.stage(done, side(x))[0]))

    def check(self, model: nn.Module) -> None:
        """Run the model once at every size that the curriculum will show it.

        Raises:
            UnmetRequirement: it takes the full images, but no smaller ones.
        """
        # BatchNorm's statistics and torch's generator stay as they are: the check must not change the training run
        with evaluating(model), torch.random.fork_rng(devices=[]):
            x = as_batch(next(iter(self.loader))).x[:2]
            sizes = sorted({even_size(ratio, side(x)) for ratio in self.train.curriculum.ratios})
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
        if isinstance(run.data.val, _HeldOut):  # and not wrapped again by another method
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
    good_for={"faster"},
    make=EfficientTrain,
    apply=_apply,
    search_space={"variant": choice("crop", "plusplus"), "max_magnitude": uniform(0.0, 9.0)},
    test_values={"fractions": (0.2, 0.2, 0.6), "ratios": (0.5, 0.75, 1.0)},
    wraps=True,
    formula="x <- real(IFFT2((B/H)^2 * corners_B(FFT2(augment(x, m))))),  B/H = 5/7, 6/7, 1 for 60, 20, 20 % of epochs",
)
