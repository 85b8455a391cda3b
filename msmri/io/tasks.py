"""Photographs degraded for restoration: boxes, pixels and tiles lost, blocks averaged, random sums taken, blur."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.io.photos import ROUNDING, Photos
from msmri.measurement import Measurement
from msmri.physics.masks import slice_seed
from msmri.physics.operators import Identity, LinearOperator, Subsample
from msmri.physics.restoration import BlockAverage, Blur, SignedHadamard
from msmri.physics.tiles import RandomPixels, RandomTiles, box_mask
from msmri.tensors import Mask, normal_like

Shape = tuple[int, int]
KEPT_BY_BLUR = 0.05  # frequencies that a blur leaves less of do not come back by its pseudo-inverse


def _box(shape: Shape, share: float, rng: Generator) -> Mask:
    return box_mask(shape, (round(share * shape[0]), round(share * shape[1])))


def _pixels(shape: Shape, share: float, rng: Generator) -> Mask:
    return RandomPixels.dropping(share).draw(shape, rng)


def _tiles(shape: Shape, share: float, rng: Generator) -> Mask:
    return RandomTiles.dropping(share).draw(shape, rng)


def _blocks(shape: Shape, factor: float, rng: Generator) -> LinearOperator:
    if factor != int(factor):
        raise InputError(f"blocks of {factor:g} pixels cannot be averaged", mend="give a whole number")
    return BlockAverage(int(factor))


def _sums(shape: Shape, share: float, rng: Generator) -> LinearOperator:
    return SignedHadamard.draw(shape, round(share * shape[0] * shape[1]), rng)


def _blur(shape: Shape, std: float, rng: Generator) -> LinearOperator:
    return Blur.gaussian(std, cutoff=KEPT_BY_BLUR)


@dataclass(frozen=True)
class Task:
    """One way to degrade photographs, and how strongly."""

    name: str  # as on the command line
    amount: float  # see ``what``
    what: str  # the amount is
    draw_mask: Callable[[Shape, float, Generator], Mask] | None = None  # of what is kept, one a photograph
    draw_operator: Callable[[Shape, float, Generator], LinearOperator] | None = None  # one for all photographs
    fixed: bool = False  # whether the mask is the same for all photographs
    pictures: bool = True  # whether what is measured are photographs again

    def operator(self, shape: Shape, seed: int = 0) -> LinearOperator:
        """Give what is done to photographs of ``shape`` before some of it is lost.

        Raises
        ------
        InputError
            If such an amount makes no sense, or does not fit the shape.
        """
        if self.draw_operator is None:
            return Identity()
        found = self.draw_operator(shape, self.amount, Generator().manual_seed(slice_seed(self.name, seed)))
        try:
            found(torch.zeros(1, 1, *shape))
        except ValueError as error:
            raise InputError(f"task '{self.name}': {error}", mend="give another --amount or --size") from error
        return found

    def degrade(self, photos: Photos, index: Sequence[int], *, noise_std: float = 0.0, seed: int = 0) -> Measurement:
        """Degrade some photographs, each in the same way whenever it is done; the clean ones go along as targets.

        Parameters
        ----------
        index
            Which of them.
        noise_std
            Standard deviation of white noise on what is measured. What the measurement states as its own also holds
            the rounding of photographs to 8 bits.
        seed
            Of operator, masks and noise; masks and noise of a photograph also go by its name.
        """
        clean, names = photos.values(list(index)), tuple(photos.names[place] for place in index)
        encoding = self.operator(photos.shape, seed)
        values, masks = [], []
        for image, name in zip(clean, names, strict=True):
            rng = Generator().manual_seed(slice_seed(name, seed))
            full = encoding(image[None])
            mask = torch.ones((1, *full.shape[-2:]), dtype=torch.bool)
            if self.draw_mask is not None:
                mask = self.draw_mask(photos.shape, self.amount, rng)
            values.append(Subsample(mask)(full + noise_std * normal_like(full, [rng]) if noise_std > 0 else full))
            masks.append(mask)
        return _measurement(torch.cat(values), torch.stack(masks), encoding, names, noise_std, clean)

    def degraded(
        self, photos: Photos, index: Sequence[int], *, mask: Mask | None = None, noise_std: float = 0.0
    ) -> Measurement:
        """Take some photographs for degraded ones, whose originals nobody knows.

        Parameters
        ----------
        mask
            Of what is known (1, y, x), where the task loses random places; places outside are not read.

        Raises
        ------
        InputError
            If no photograph can be such a measurement, or it needs another mask.
        """
        if not self.pictures:
            raise InputError(f"photographs are no measurements of task '{self.name}'", mend="give the originals")
        values, names = photos.values(list(index)), tuple(photos.names[place] for place in index)
        encoding = self.draw_operator(photos.shape, self.amount, Generator()) if self.draw_operator else Identity()
        if mask is None and self.fixed and self.draw_mask is not None:
            mask = self.draw_mask(photos.shape, self.amount, Generator())
        if (mask is None) != (self.draw_mask is None):
            raise InputError(
                f"task '{self.name}' needs {'a' if mask is None else 'no'} mask",
                mend="give --mask, black where pixels are lost" if mask is None else "leave --mask out",
            )
        known = torch.ones((1, *photos.shape), dtype=torch.bool) if mask is None else mask
        if known.shape != (1, *photos.shape) or not bool(known.any()):
            raise InputError(
                f"a mask of {known.shape[-2]} x {known.shape[-1]} does not fit photographs of {photos.shape[0]} x "
                f"{photos.shape[1]}, or nothing is known",
                mend="give one of their size",
            )
        masks = known.expand(len(values), *known.shape)
        return _measurement(Subsample(masks)(values), masks, encoding, names, noise_std, None)


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("box", 0.5, "share of either side that the lost box in the middle takes", _box, fixed=True),
            Task("super-resolution", 4, "pixels along either side of the averaged blocks", None, _blocks),
            Task("random", 0.4, "share of the pixels lost", _pixels),
            Task("tiles", 0.4, "share of 4 x 4 tiles lost", _tiles),
            Task(
                "sensing", 0.25, "number of random sums measured, as a share of the pixels", None, _sums, pictures=False
            ),
            Task("blur", 1.0, "standard deviation of the Gaussian in pixels", None, _blur),
        )
    }
)


def find_task(name: str, amount: float | None = None) -> Task:
    """Give a task by its name, with another amount than its own if one is given.

    Raises
    ------
    InputError
        If there is no such task, or the amount is not positive and finite.
    """
    if name not in TASKS:
        raise InputError(f"there is no task '{name}'", mend=f"one of {', '.join(TASKS)}")
    if amount is None:
        return TASKS[name]
    if not 0 < amount < math.inf:
        raise InputError(f"task '{name}' cannot have amount {amount}", mend=f"give the {TASKS[name].what}")
    return replace(TASKS[name], amount=amount)


def plain_input(measurement: Measurement) -> Tensor:
    """Show what was measured as images (b, 3, y, x): as it is where it has their size, else by the pseudo-inverse."""
    assert measurement.encoding is not None
    blank = measurement.encoding.adjoint(measurement.values)
    if blank.shape == measurement.values.shape:
        return measurement.values
    return getattr(measurement.encoding, "pseudo_inverse", measurement.encoding.adjoint)(measurement.values)


def _measurement(
    values: Tensor,
    masks: Mask,
    encoding: LinearOperator,
    names: tuple[str, ...],
    noise_std: float,
    target: Tensor | None,
) -> Measurement:
    n = len(values)
    return Measurement(
        values,
        masks,
        encoding,
        noise_std=torch.full((n, 1, 1, 1), math.hypot(noise_std, ROUNDING)),
        scale=torch.ones(n, 1, 1, 1),
        source=names,
        target=target,
        full_scale=1.0,
    )
