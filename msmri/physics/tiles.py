"""Masks of single places without a centre, as for inpainting: laws of dropped tiles and pixels, squares, boxes."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.physics.laws import MaskLaw
from msmri.tensors import Mask


@dataclass(frozen=True)
class DroppingLaw(MaskLaw):
    """A law told by the share p of an image that it drops, the same in all channels: acceleration 1 / (1 - p)."""

    acceleration: float = 1 / (1 - 0.4)  # nominal; p = 0.4 as in Park et al. 2025

    lines: ClassVar[bool] = False

    @classmethod
    def dropping(cls, p: float) -> Self:
        """Make the law that drops the share ``p`` of an image.

        Raises
        ------
        InputError
            Unless 0 <= p < 1.
        """
        if not 0 <= p < 1:
            raise InputError(f"{cls.name}: p = {p} is no share below 1", mend="give 0 <= p < 1")
        return cls(1 / (1 - p))

    @property
    def dropped(self) -> float:
        """The share p asked for."""
        return 1 - 1 / self.acceleration

    def centre_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Give (0, 0): no place is sure to be kept."""
        return 0, 0


@dataclass(frozen=True)
class RandomPixels(DroppingLaw):
    """Keep every pixel with probability 1 - p, in all channels at once: random inpainting. Aali et al. 2024 (A-DPS)."""

    name: ClassVar[str] = "random-pixels"

    def draw(self, shape: tuple[int, int], rng: Generator) -> Mask:
        """Draw one mask (1, y, x)."""
        return torch.rand((1, *shape), generator=rng, dtype=torch.float64) < 1 / self.acceleration

    def inclusion_probability(self, shape: tuple[int, int]) -> Float[Tensor, "1 y x"]:
        """Give the probability of every pixel: exactly 1 - p."""
        return torch.full((1, *shape), 1 / self.acceleration, dtype=torch.float64)


@dataclass(frozen=True)
class RandomTiles(DroppingLaw):
    """Drop ``floor(16 p)`` of 4 x 4 tiles and roll the whole pattern by up to one tile. Park et al. 2025 (MSM).

    Tiles are a quarter of the image wide; where the size is no multiple of 4 they differ by one pixel. The pattern is
    rolled around the edges, by 0 up to one pixel less than a tile along each axis. As every tile is as likely to be
    dropped as every other, wherever the pattern lies, each pixel is kept with the same probability.
    """

    grid: int = 4  # tiles along each axis

    name: ClassVar[str] = "random-tiles"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid < 1:
            raise InputError(f"{self.name}: {self.grid} tiles along each axis", mend="give 1 or more")

    @property
    def kept(self) -> int:
        """How many tiles every mask keeps: all but ``floor(grid^2 p)``, and at least one."""
        total = self.grid**2
        return max(1, total - math.floor(total * self.dropped + 1e-9))  # 2/9 comes back as less

    def draw(self, shape: tuple[int, int], rng: Generator) -> Mask:
        """Draw one mask (1, y, x)."""
        shift = self._shift(shape, rng)
        return self._lay(torch.randperm(self.grid**2, generator=rng)[: self.kept], shape, shift)

    def inclusion_probability(self, shape: tuple[int, int]) -> Float[Tensor, "1 y x"]:
        """Give the probability of every pixel: exactly the share of tiles kept."""
        self._require_room(shape)
        return torch.full((1, *shape), self.kept / self.grid**2, dtype=torch.float64)

    def covering(
        self, shape: tuple[int, int], n: int, rng: Generator, *, include: Mask | None = None
    ) -> Bool[Tensor, "n 1 y x"]:
        """Draw ``n`` masks of which each few cover the image: a draw, its complement with some extra tiles, and so on.

        The tiles of one pattern are dealt out like cards; when they are used up the hand is filled with others of the
        same pattern, and the next mask begins a pattern with a shift of its own. Each mask by itself follows the law.
        """
        masks, deck, shift = [], torch.empty(0, dtype=torch.int64), (0, 0)
        for _ in range(n):
            if len(deck) == 0:
                shift, deck = self._shift(shape, rng), torch.randperm(self.grid**2, generator=rng)
            hand, deck = deck[: self.kept], deck[self.kept :]
            if missing := self.kept - len(hand):
                others = torch.randperm(self.grid**2, generator=rng)
                hand = torch.cat([hand, others[~torch.isin(others, hand)][:missing]])
            masks.append(self._lay(hand, shape, shift))
        stack = torch.stack(masks)
        return stack if include is None else stack.to(include.device) | include

    def halve(self, mask: Mask, shape: tuple[int, int], rng: Generator) -> Bool[Tensor, "2 1 y x"]:
        """Refuse: single pixels are not tiles."""
        raise InputError(f"masks of {self.name} cannot be halved", mend="do without extrapolation")

    def _shift(self, shape: tuple[int, int], rng: Generator) -> tuple[int, int]:
        self._require_room(shape)
        down, right = (int(torch.randint(0, math.ceil(size / self.grid), (), generator=rng)) for size in shape)
        return down, right

    def _lay(self, tiles: Tensor, shape: tuple[int, int], shift: tuple[int, int]) -> Mask:
        """Mark the pixels of some tiles, numbered row by row."""
        kept = torch.zeros(self.grid**2, dtype=torch.bool)
        kept[tiles] = True
        rows, columns = (
            torch.roll(torch.arange(size) * self.grid // size, by) for size, by in zip(shape, shift, strict=True)
        )
        return kept[self.grid * rows[:, None] + columns][None]

    def _require_room(self, shape: tuple[int, int]) -> None:
        if min(shape) < self.grid:
            raise InputError(
                f"{self.name}: {shape[0]} x {shape[1]} pixels cannot be cut into {self.grid} x {self.grid} tiles",
                mend="give larger images",
            )


@dataclass(frozen=True)
class FurtherTiles:
    """Take squares as large as a tile away from a mask: ambient diffusion of dropped tiles. Daras et al. 2023.

    Each square, a ``grid``-th of the image along both axes and around its edges, hides a random place of the mask, at
    a random position within the square; so every place has a chance to be hidden, and so has all around it.
    """

    count: int = 1  # squares
    grid: int = 4  # how many of them fit along each axis

    def __post_init__(self) -> None:
        if self.count < 0 or self.grid < 1:
            raise InputError(f"further tiles: no such {self}", mend="give count >= 0, grid >= 1")

    def __call__(self, mask: Mask, rng: Generator) -> Mask:
        """Draw a part of the mask (1, y, x)."""
        height, width = mask.shape[-2:]
        gone = torch.zeros(height, width, dtype=torch.bool)
        places = mask.reshape(-1, height, width).any(0).cpu().nonzero()
        for _ in range(self.count if len(places) else 0):
            place = places[int(torch.randint(0, len(places), (), generator=rng))].tolist()
            inside = []
            for at, size in zip(place, (height, width), strict=True):
                side = math.ceil(size / self.grid)
                first = at - int(torch.randint(0, side, (), generator=rng))
                inside.append((torch.arange(size) - first) % size < side)
            gone |= inside[0][:, None] & inside[1]
        return mask & ~gone.to(mask.device)


def box_mask(shape: tuple[int, int], box: tuple[int, int], *, at: tuple[int, int] | None = None) -> Mask:
    """Mark all pixels (1, y, x) but those of one box: the mask of box inpainting, for ``Subsample``.

    Parameters
    ----------
    shape
        Rows and columns of the image.
    box
        Rows and columns of what is dropped; (128, 128) of (256, 256) in Park et al. 2025.
    at
        Its upper left pixel; in the middle without it.

    Raises
    ------
    InputError
        If the box does not lie within the image, or nothing is left beside it.
    """
    top, left = at if at is not None else (shape[0] // 2 - box[0] // 2, shape[1] // 2 - box[1] // 2)
    bottom, right = top + box[0], left + box[1]
    if min(*box, top, left) < 0 or bottom > shape[0] or right > shape[1] or tuple(box) == tuple(shape):
        raise InputError(
            f"a box of {box[0]} x {box[1]} at ({top}, {left}) does not fit an image of {shape[0]} x {shape[1]}",
            mend="give a smaller one inside it",
        )
    mask = torch.ones((1, *shape), dtype=torch.bool)
    mask[:, top:bottom, left:right] = False
    return mask
