"""What a law of masks promises: draws, the probability of every place, masks dealt out so that they cover."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.tensors import Mask

BLIND = 1e-6  # a place met less than once in a million masks counts as never sampled


@dataclass(frozen=True)
class MaskLaw(ABC):
    """A probability law over masks; a subclass writes ``draw``, ``inclusion_probability`` and ``centre_size``."""

    acceleration: float  # nominal: places of the full matrix over places asked for, before any extra centre

    name: ClassVar[str] = ""  # as on the command line
    lines: ClassVar[bool] = True  # whole columns are sampled; False for laws of single places (ky, kx)

    def __post_init__(self) -> None:
        if not 1 <= self.acceleration < math.inf:
            raise InputError(
                f"{self.name}: acceleration {self.acceleration} is below 1 or no number", mend="give R >= 1"
            )

    @abstractmethod
    def draw(self, shape: tuple[int, int], rng: Generator) -> Mask:
        """Draw one mask (1, 1 or ky, kx) for a matrix of ``shape`` (ky, kx)."""

    @abstractmethod
    def inclusion_probability(self, shape: tuple[int, int]) -> Float[Tensor, "1 ky kx"]:
        """Give the probability of every place to be in a mask, float64 (1, 1 or ky, kx)."""

    @abstractmethod
    def centre_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Give the rows and columns of the block around zero frequency that every mask holds."""

    @classmethod
    def example(cls) -> Self:
        """Make a small instance for contract tests."""
        return cls(acceleration=4.0)

    @property
    def nominal_acceleration(self) -> float:
        """The acceleration asked for, which a law with an extra centre does not reach."""
        return float(self.acceleration)

    def expected_acceleration(self, shape: tuple[int, int]) -> float:
        """Give the true acceleration to expect: one over the mean inclusion probability."""
        return 1.0 / float(self.inclusion_probability(shape).mean())

    def describe(self, shape: tuple[int, int]) -> str:
        """Say in one line what the law does to a matrix: nominal and expected acceleration, centre."""
        probability = self.inclusion_probability(shape)
        rows, columns = self.centre_size(shape)
        unit, centre = ("lines", f"{columns} centre lines") if self.lines else ("places", f"{rows} x {columns} centre")
        return (
            f"{self.name.replace('-', ' ')}: nominal {self.nominal_acceleration:.2f}, "
            f"expected {1.0 / float(probability.mean()):.2f} "
            f"({float(probability.sum()):.1f} of {probability.numel()} {unit}), {centre}"
        )

    def covering(
        self, shape: tuple[int, int], n: int, rng: Generator, *, include: Mask | None = None
    ) -> Bool[Tensor, "n 1 ky kx"]:
        """Draw ``n`` masks that together reach as many places as masks of their sizes can; see ``masks.covering``."""
        probability = self.inclusion_probability(shape)
        given = probability >= 1
        if include is not None:
            given = given | (include.cpu().all(-2, keepdim=True) if self.lines else include.cpu())
        pool = (~given & (probability >= BLIND)).flatten().nonzero().flatten()
        masks = given.flatten().repeat(n, 1)
        deck = pool[:0]
        for mask in masks:
            size = int(self.draw(shape, rng).flatten()[pool].sum())
            hand, deck = deck[:size], deck[size:]
            if missing := size - len(hand):
                deck = pool[torch.randperm(len(pool), generator=rng)]
                held = torch.isin(deck, hand)
                fresh = deck[~held]
                hand, deck = torch.cat([hand, fresh[:missing]]), torch.cat([deck[held], fresh[missing:]])
            mask[hand] = True
        masks = masks.reshape(n, *given.shape)
        return masks if include is None else masks.to(include.device) | include

    def halve(self, mask: Mask, shape: tuple[int, int], rng: Generator) -> Bool[Tensor, "2 1 ky kx"]:
        """Split a mask of a matrix of ``shape`` into two, each with half of its random places; the sure ones in both.

        Raises
        ------
        InputError
            If the law is one of patterns, whose halves would not be like its masks.
        """
        sure = self.inclusion_probability(shape) >= 1
        chosen = (mask.cpu() & ~sure).flatten().nonzero().flatten()
        order = chosen[torch.randperm(len(chosen), generator=rng)]
        halves = (mask.cpu() & sure).flatten().repeat(2, 1)
        for half, places in zip(halves, order.tensor_split(2), strict=True):
            half[places] = True
        return halves.reshape(2, *mask.shape).to(mask.device)


def checked_centre(name: str, lines: int, size: int) -> int:
    """Give the number of central ``lines`` of the law ``name``; refuse more than the ``size`` there is."""
    if not 0 <= lines <= size:
        raise InputError(f"{name}: {lines} centre lines do not fit a matrix of {size}", mend="give a smaller centre")
    return lines
