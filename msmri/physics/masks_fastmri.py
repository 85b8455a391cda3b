"""The laws of ``fastmri.data.subsample``: masks that fastMRI's own code draws, with exact probabilities."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.physics.laws import MaskLaw, checked_centre
from msmri.tensors import Mask


@dataclass(frozen=True)
class FastMRILaw(MaskLaw):
    """A law of ``fastmri.data.subsample``, drawn by fastMRI's own code: the same seed gives the same mask.

    The centre is fastMRI's: ``n`` columns from ``(W - n + 1) // 2`` on.
    """

    centre_fraction: float | None = None  # of the columns; 0.32 / R without one: fastMRI's 0.08 at R = 4, 0.04 at 8

    kind: ClassVar[str] = ""  # fastMRI's word for the law
    whole: ClassVar[bool] = False  # fastMRI's code needs an integer acceleration
    budgeted: ClassVar[bool] = False  # the centre counts as part of the W / R lines, and must not exceed them

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whole and self.acceleration != round(self.acceleration):
            raise InputError(
                f"{self.name}: acceleration {self.acceleration} is not a whole number",
                mend="give one, or use equispaced-lines",
            )

    def draw(self, shape: tuple[int, int], rng: Generator) -> Mask:
        """Draw one mask (1, 1, kx)."""
        return self.draw_seeded(shape, int(torch.randint(0, 2**32, (), generator=rng)))

    def draw_seeded(self, shape: tuple[int, int], seed: int | tuple[int, ...], offset: int | None = None) -> Mask:
        """Draw the mask (1, 1, kx) that fastMRI draws with ``seed`` and, for spaced lines, ``offset``."""
        from fastmri.data.subsample import create_mask_for_mask_type

        self.centre_size(shape)  # refuses what fastMRI's code cannot draw
        acceleration = int(self.acceleration) if self.whole else self.acceleration
        draw = create_mask_for_mask_type(self.kind, [self._fraction], [acceleration])
        mask, _ = draw((1, shape[1], 1), offset=offset, seed=seed)
        return mask.bool().reshape(1, 1, shape[1])

    @property
    def _fraction(self) -> float:
        return 0.32 / self.acceleration if self.centre_fraction is None else self.centre_fraction

    def centre_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Give the rows and columns of the full centre; refuse one wider than the lines that R allows."""
        width, centre = shape[1], checked_centre(self.name, round(shape[1] * self._fraction), shape[1])
        if self.budgeted and (centre * self.acceleration > width or centre == width or self._offsets(width) < 0):
            raise InputError(
                f"{self.name}: {centre} centre lines use up the {width / self.acceleration:.1f} of {width} lines "
                f"that acceleration {self.acceleration:g} allows",
                mend="lower the acceleration or the centre fraction",
            )
        return shape[0], centre

    def _offsets(self, width: int) -> int:
        """Count the offsets that fastMRI chooses from with equal probability."""
        return round(self.acceleration)

    def inclusion_probability(self, shape: tuple[int, int]) -> Float[Tensor, "1 1 kx"]:
        """Give the exact probability of every column: the mean over all offsets."""
        self.centre_size(shape)
        masks = [self.draw_seeded(shape, 0, offset) for offset in range(self._offsets(shape[1]))]
        return torch.stack(masks).double().mean(0)


@dataclass(frozen=True)
class FastMRIRandom(FastMRILaw):
    """fastMRI's ``random``: the centre, and other columns by chance so that W / R are expected in all."""

    name: ClassVar[str] = "fastmri-random"
    kind: ClassVar[str] = "random"
    budgeted: ClassVar[bool] = True

    def inclusion_probability(self, shape: tuple[int, int]) -> Float[Tensor, "1 1 kx"]:
        """Give the exact probability of every column."""
        width, (_, centre) = shape[1], self.centre_size(shape)
        probability = torch.full((1, 1, width), (width / self.acceleration - centre) / (width - centre)).double()
        start = (width - centre + 1) // 2
        probability[..., start : start + centre] = 1.0
        return probability


@dataclass(frozen=True)
class FastMRIEquispaced(FastMRILaw):
    """fastMRI's ``equispaced``: every R-th column and the centre."""

    name: ClassVar[str] = "fastmri-equispaced"
    kind: ClassVar[str] = "equispaced"
    whole: ClassVar[bool] = True


@dataclass(frozen=True)
class FastMRIEquispacedFraction(FastMRILaw):
    """fastMRI's ``equispaced_fraction``: spacing widened to pay for the centre; it may have blind spots."""

    name: ClassVar[str] = "fastmri-equispaced-fraction"
    kind: ClassVar[str] = "equispaced_fraction"
    budgeted: ClassVar[bool] = True

    def _offsets(self, width: int) -> int:
        centre = round(width * self._fraction)
        spare = centre * self.acceleration - width
        return round(self.acceleration * (centre - width) / spare) if spare else -1  # fastMRI divides by zero


@dataclass(frozen=True)
class FastMRIMagic(FastMRILaw):
    """fastMRI's ``magic`` (Defazio 2019): the two halves interleave under conjugation; half may be blind spots."""

    name: ClassVar[str] = "fastmri-magic"
    kind: ClassVar[str] = "magic"
    whole: ClassVar[bool] = True
