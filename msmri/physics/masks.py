"""Undersampling masks of k-space: random laws with stated inclusion probabilities, and what can be said of a draw."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.physics.laws import BLIND, MaskLaw, checked_centre
from msmri.physics.masks_fastmri import FastMRIEquispaced, FastMRIEquispacedFraction, FastMRIMagic, FastMRIRandom
from msmri.physics.masks_fastmri import FastMRILaw as FastMRILaw  # where it was before
from msmri.physics.tiles import RandomPixels, RandomTiles
from msmri.tensors import Mask, Rng

MSM_CENTRE_FRACTION = 20 / 256  # Park et al. 2025: 20 central columns of 256
TRIALS_SEED = 20250519  # the Monte-Carlo estimates' own seed, so that a law's numbers never change


@dataclass(frozen=True)
class CentredLaw(MaskLaw):
    """A law with a full centre: ``n`` places from index ``size // 2 - n // 2`` on, so that zero frequency is inside."""

    centre_fraction: float = MSM_CENTRE_FRACTION  # of each undersampled axis, rounded
    centre_lines: int | None = None  # number of central lines, instead of the fraction

    def _centre(self, size: int) -> int:
        lines = round(self.centre_fraction * size) if self.centre_lines is None else self.centre_lines
        return checked_centre(self.name, lines, size)

    def centre_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Give the rows and columns of the full centre."""
        return (shape[0] if self.lines else self._centre(shape[0])), self._centre(shape[1])

    def centre(self, shape: tuple[int, int]) -> Mask:
        """Mark the full centre, (1, 1 or ky, kx)."""
        columns = _block(shape[1], self._centre(shape[1]))
        return (columns[None] if self.lines else _block(shape[0], self._centre(shape[0]))[:, None] & columns)[None]


@dataclass(frozen=True)
class RandomLines(CentredLaw):
    """Take every column with probability 1/R, and the central columns always. Park et al. 2025 (MSM)."""

    name: ClassVar[str] = "random-lines"

    def draw(self, shape: tuple[int, int], rng: Generator) -> Mask:
        """Draw one mask (1, 1, kx)."""
        chosen = torch.rand((1, 1, shape[1]), generator=rng, dtype=torch.float64) < 1 / self.acceleration
        return chosen | self.centre(shape)

    def inclusion_probability(self, shape: tuple[int, int]) -> Float[Tensor, "1 1 kx"]:
        """Give the probability of every column: exactly 1/R outside the centre."""
        return self.centre(shape).double().clamp_min(1 / self.acceleration)


@dataclass(frozen=True)
class EquispacedLines(CentredLaw):
    """Take every R-th column from a random offset, and the central columns always; R need not be whole."""

    name: ClassVar[str] = "equispaced-lines"

    def draw(self, shape: tuple[int, int], rng: Generator) -> Mask:
        """Draw one mask (1, 1, kx): columns ``floor(offset + j R)`` with the offset uniform in [0, R)."""
        offset = self.acceleration * torch.rand((), generator=rng, dtype=torch.float64)
        steps = torch.arange(math.ceil(shape[1] / self.acceleration) + 1, dtype=torch.float64)
        columns = torch.floor(offset + self.acceleration * steps).long()
        mask = self.centre(shape)
        mask[..., columns[columns < shape[1]]] = True
        return mask

    def inclusion_probability(self, shape: tuple[int, int]) -> Float[Tensor, "1 1 kx"]:
        """Give the probability of every column: exactly 1/R outside the centre."""
        return self.centre(shape).double().clamp_min(1 / self.acceleration)


@dataclass(frozen=True)
class GaussianLines(CentredLaw):
    """Take exactly ``round(W / R)`` columns: the centre, and others without replacement with Gaussian weights.

    A column at distance d from zero frequency has weight ``exp(-d^2 / (2 (spread W)^2))``.
    """

    spread: float = 0.2  # standard deviation of the weights, as a fraction of the matrix width W

    name: ClassVar[str] = "gaussian-lines"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.spread < math.inf:
            raise InputError(f"{self.name}: spread {self.spread} is not positive", mend="give a fraction such as 0.2")

    def _outer(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Give the columns outside the centre, the logarithms of their weights, and how many of them to draw."""
        budget, centre = round(shape[1] / self.acceleration), self._centre(shape[1])
        if budget < max(centre, 1):
            raise InputError(
                f"{self.name}: {centre} centre lines leave nothing of the {budget} of {shape[1]} lines "
                f"that acceleration {self.acceleration:g} allows",
                mend="lower the acceleration or the centre",
            )
        columns = (~self.centre(shape)).flatten().nonzero().flatten()
        distance = (columns - shape[1] // 2).double()
        return columns, -(distance**2) / (2 * (self.spread * shape[1]) ** 2), budget - centre

    def draw(self, shape: tuple[int, int], rng: Generator) -> Mask:
        """Draw one mask (1, 1, kx)."""
        columns, log_weight, count = self._outer(shape)
        # the first arrivals of exponential clocks are a weighted sample without replacement; in logarithms, since
        # far columns have weights too small for a float
        uniform = torch.rand(columns.shape, generator=rng, dtype=torch.float64)
        log_arrival = torch.log(-torch.log1p(-uniform)) - log_weight
        mask = self.centre(shape)
        mask[..., columns[log_arrival.argsort()[:count]]] = True
        return mask

    def inclusion_probability(self, shape: tuple[int, int]) -> Float[Tensor, "1 1 kx"]:
        """Give the probability of every column, by an integral that is exact to about nine digits."""
        return _gaussian_probability(self, shape).clone()


@dataclass(frozen=True)
class PoissonDisc(CentredLaw):
    """Take single places (ky, kx), none close to another, sparser away from the centre, which is full.

    Places are visited in random order, and one is taken unless it lies within the radius of one taken before. The
    radius is ``1 + slope * distance``, distance being 0 at the rim of the centre and 1 at the edge of the matrix on
    either axis; its square is rounded at random to a neighbouring integer, without which a grid knows few densities.
    The slope is found once a shape, by bisection, so that the expected acceleration is the nominal one to about 2 %.
    Same density law as SigPy's ``poisson``, which is not used because its search may never end.
    """

    crop_corners: bool = False  # leave out the corners, distance > 1; such a law has blind spots

    name: ClassVar[str] = "poisson-disc"
    lines: ClassVar[bool] = False

    def distance(self, shape: tuple[int, int]) -> Float[Tensor, "ky kx"]:
        """Give the normalised distance of every place from the rim of the centre."""
        axes = []
        for size in shape:
            outside = ((torch.arange(size) - size // 2).abs() - self._centre(size) / 2).clamp_min(0.0).double()
            axes.append(outside / outside.max().clamp_min(0.5))
        return torch.hypot(axes[0][:, None], axes[1])

    def draw(self, shape: tuple[int, int], rng: Generator) -> Mask:
        """Draw one mask (1, ky, kx)."""
        return self._throw(shape, _poisson_slope(self, shape), rng)

    def inclusion_probability(self, shape: tuple[int, int]) -> Float[Tensor, "1 ky kx"]:
        """Estimate the probability of every place from trial draws with a seed of their own.

        50 (large matrices) to 200 (small ones) draws, pooled over the places, mostly four, with the same distances
        from zero frequency along both axes: standard error below 0.036, on the axes 0.05. Every place is possible, so
        one that no trial reached gets half a count.
        """
        return _poisson_probability(self, shape).clone()

    def _throw(self, shape: tuple[int, int], slope: float, rng: Generator) -> Mask:
        """Take places in random order for a given slope."""
        distance = self.distance(shape)
        dither = torch.rand(shape, generator=rng, dtype=torch.float64)
        reach = torch.floor((1 + slope * distance) ** 2 + dither).long().flatten()  # squared distances below are taken
        order = torch.randperm(reach.numel(), generator=rng)
        margin = math.isqrt(int(reach.max())) + 1
        width = shape[1] + 2 * margin
        spots = (order // shape[1] + margin) * width + order % shape[1] + margin

        taken = self.centre(shape)[0].clone()
        closed = taken | (distance > 1) if self.crop_corners else taken
        padded = np.pad(closed.numpy(), margin, constant_values=True).reshape(-1)
        is_closed = padded.data  # a memoryview: far quicker than the array for single places
        stamps: dict[int, np.ndarray] = {}
        chosen = []
        for place, spot, radius in zip(order.tolist(), spots.tolist(), reach[order].tolist()):
            if not is_closed[spot]:
                if radius not in stamps:
                    near = torch.arange(-math.isqrt(radius), math.isqrt(radius) + 1)
                    rows, columns = (near[:, None] ** 2 + near**2 < radius).nonzero(as_tuple=True)
                    stamps[radius] = (near[rows] * width + near[columns]).numpy()
                padded[spot + stamps[radius]] = True
                chosen.append(place)
        taken.view(-1)[chosen] = True
        return taken[None]


LAWS: Mapping[str, type[MaskLaw]] = MappingProxyType(
    {
        law.name: law
        for law in (
            RandomLines,
            EquispacedLines,
            FastMRIRandom,
            FastMRIEquispaced,
            FastMRIEquispacedFraction,
            FastMRIMagic,
            GaussianLines,
            PoissonDisc,
            RandomTiles,
            RandomPixels,
        )
    }
)


def law_from_name(name: str, *, acceleration: float, **options: Any) -> MaskLaw:
    """Make the law of a name in ``LAWS``; an option that is None keeps its default.

    Raises
    ------
    InputError
        If the name, or an option, is not known.
    """
    if name not in LAWS:
        raise InputError(f"there is no mask law '{name}'", mend=f"choose one of {', '.join(LAWS)}")
    known = [field.name for field in fields(LAWS[name]) if field.name != "acceleration"]
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(known)):
        raise InputError(f"mask law {name} has no option {', '.join(unknown)}", mend=f"it has {', '.join(known)}")
    return LAWS[name](acceleration=acceleration, **given)


def draw_masks(law: MaskLaw, shape: tuple[int, int], rng: Rng) -> Bool[Tensor, "batch 1 ky kx"]:
    """Draw one mask a generator, (batch, 1, 1 or ky, kx)."""
    return torch.stack([law.draw(shape, generator) for generator in rng])


def covering(
    law: MaskLaw, shape: tuple[int, int], n: int, rng: Generator, *, include: Mask | None = None
) -> Bool[Tensor, "n 1 ky kx"]:
    """Draw ``n`` masks that together reach as many places as masks of their sizes can.

    Each mask holds as many random places as a draw of ``law`` would, but they are dealt out like cards: through a
    shuffled deck of all places, the deck being shuffled anew when it is used up. So no place comes twice before
    every place has come once. Where all random places of the law are equally likely (random and equispaced lines)
    each keeps its inclusion probability; a law of variable density is flattened outside its centre. A law of patterns
    deals out the parts of a pattern instead, such as :meth:`msmri.physics.tiles.RandomTiles.covering`.

    Parameters
    ----------
    include
        (1, 1 or ky, kx), places that are put into every mask, such as the measured ones, and are not dealt out.
    """
    return law.covering(shape, n, rng, include=include)


def blind_spots(law: MaskLaw, shape: tuple[int, int]) -> Bool[Tensor, "1 ky kx"]:
    """Mark the places that the law never samples (inclusion probability below ``BLIND``)."""
    return law.inclusion_probability(shape) < BLIND


def require_coverage(law: MaskLaw, shape: tuple[int, int]) -> None:
    """Refuse a law that never samples some place.

    Raises
    ------
    InputError
        If there are blind spots: what is never measured is never supervised, and no sampler can fill it in later.
    """
    blind = blind_spots(law, shape)
    if count := int(blind.sum()):
        raise InputError(
            f"mask law {law.name} at acceleration {law.acceleration:g} never samples {count} of {blind.numel()} "
            f"{'lines' if law.lines else 'places'}, so it cannot train MSM: places never measured get no supervision",
            mend="use a law that reaches every place, such as random-lines",
        )


def acceleration(mask: Mask) -> float:
    """Give the true acceleration of drawn masks: all places over sampled places."""
    sampled = int(mask.sum())
    return mask.numel() / sampled if sampled else math.inf


def centre_width(mask: Mask) -> int:
    """Count the contiguous sampled columns around zero frequency.

    The largest n for which the n columns from ``W // 2 - n // 2`` on are sampled, in every row and every mask.
    """
    columns = mask.reshape(-1, mask.shape[-1]).all(0).tolist()
    centre = len(columns) // 2
    if not columns[centre]:
        return 0
    left = [*columns[:centre][::-1], False]
    right = [*columns[centre + 1 :], False]
    return min(2 * left.index(False) + 1, 2 * right.index(False) + 2, len(columns))


def slice_seed(name: str, seed: int) -> int:
    """Turn a slice's name and a run's seed into the seed of its mask: 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def _block(size: int, n: int) -> Bool[Tensor, " size"]:
    """Mark ``n`` of ``size`` places such that ``size // 2`` is inside and the rest lies around it evenly."""
    block = torch.zeros(size, dtype=torch.bool)
    start = size // 2 - n // 2
    block[start : start + n] = True
    return block


@lru_cache(maxsize=64)
def _gaussian_probability(law: GaussianLines, shape: tuple[int, int]) -> Tensor:
    columns, log_weight, count = law._outer(shape)
    probability = law.centre(shape).double()
    probability[..., columns] = _arrival_probability(log_weight, count)
    return probability


def _arrival_probability(log_weight: Tensor, count: int) -> Float[Tensor, " item"]:
    """Give the probability of every item to be among the first ``count`` drawn by weight without replacement.

    Item i arrives at an exponential time of rate w_i and is drawn if fewer than ``count`` others came before. The
    integral over its time is a trapezoidal sum in the logarithm of time, which converges geometrically; the number of
    other arrivals is Poisson-binomial, from a recursion up to the item joined with one down to it.
    """
    if count == 0 or count >= len(log_weight):
        return torch.full_like(log_weight, float(count > 0))
    log_weight = log_weight - log_weight.max()
    # until `count` others are sure to have come; steps finer than the width 1 / sqrt(count) of that transition
    step = min(0.25, 0.5 / math.sqrt(count))
    end = math.log(40) - float(log_weight.sort(descending=True).values[count])
    times = torch.arange(-24.0, end, step, dtype=torch.float64)
    total = torch.zeros_like(log_weight)
    for some in times.split(64):
        rate = torch.exp(log_weight[:, None] + some)
        arrived = -torch.expm1(-rate)
        before = _others(arrived, count)
        after = _others(arrived.flip(0), count).flip(0).cumsum(-1).flip(-1)
        total += (rate * torch.exp(-rate) * (before * after).sum(-1)).sum(1) * step
    return total.clamp(0.0, 1.0)


def _others(arrived: Tensor, count: int) -> Float[Tensor, "item time count"]:
    """Give for each item the distribution, below ``count``, of how many of the items ahead of it have arrived."""
    state = torch.zeros(arrived.shape[1], count, dtype=arrived.dtype)
    state[:, 0] = 1.0
    states = []
    for p in arrived[..., None]:
        states.append(state)
        state = state * (1 - p) + torch.nn.functional.pad(state[:, :-1], (1, 0)) * p
    return torch.stack(states)


@lru_cache(maxsize=64)
def _poisson_slope(law: PoissonDisc, shape: tuple[int, int]) -> float:
    """Find the slope of the radius that gives the nominal acceleration on average."""
    places = shape[0] * shape[1]
    trials = max(1, round(8_000 / places))

    def achieved(slope: float) -> float:
        rng = torch.Generator().manual_seed(TRIALS_SEED)
        return trials * places / sum(int(law._throw(shape, slope, rng).sum()) for _ in range(trials))

    low, high = 0.0, 0.5
    while achieved(high) < law.acceleration and high < max(shape):
        low, high = high, 2 * high
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if achieved(middle) < law.acceleration else (low, middle)
    reached = achieved(high)
    if abs(reached / law.acceleration - 1) > 0.02:
        raise InputError(
            f"{law.name}: acceleration {law.acceleration:g} cannot be met on a {shape[0]} x {shape[1]} matrix with a "
            f"{' x '.join(map(str, law.centre_size(shape)))} centre, the nearest is {reached:.2f}",
            mend="change the acceleration or the centre",
        )
    return high


@lru_cache(maxsize=64)
def _poisson_probability(law: PoissonDisc, shape: tuple[int, int]) -> Tensor:
    slope = _poisson_slope(law, shape)
    trials = min(max(2_000_000 // (shape[0] * shape[1]), 50), 200)
    rng = torch.Generator().manual_seed(TRIALS_SEED)
    counts = torch.stack([law._throw(shape, slope, rng) for _ in range(trials)]).double().sum(0)
    rows, columns = ((torch.arange(size) - size // 2).abs() for size in shape)
    alike = (rows[:, None] * (shape[1] + 1) + columns).flatten()
    tries = trials * torch.bincount(alike)[alike]
    frequency = torch.bincount(alike, counts.flatten())[alike] / tries
    probability = torch.minimum(torch.maximum(frequency, 0.5 / tries), 1 - 0.5 / tries).reshape(1, *shape)
    if law.crop_corners:
        probability[0, law.distance(shape) > 1] = 0.0
    return torch.where(law.centre(shape), 1.0, probability)
