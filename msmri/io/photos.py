"""Photographs: folders, zip and npz files of RGB images as measurements in [-1, 1] and as training data."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor

from msmri.errors import InputError, InputWarning
from msmri.io.pictures import FaultError, Fit, pictures, square
from msmri.measurement import Measurement
from msmri.physics.laws import MaskLaw
from msmri.physics.masks import require_coverage, slice_seed
from msmri.physics.operators import Identity, Subsample
from msmri.physics.tiles import RandomTiles
from msmri.tensors import normal_like

Split = Literal["all", "train", "test"]
Faulty = Literal["refuse", "skip"]

ROUNDING = 2 / 255 / math.sqrt(12)  # std of what 8 bits leave of values in [-1, 1]


@dataclass(frozen=True)
class Photos:
    """RGB photographs of one size, in memory as bytes."""

    pixels: Tensor  # uint8 (n, 3, y, x)
    names: tuple[str, ...]  # path within the folder or archive; of an npz, its `source`
    skipped: tuple[str, ...] = ()  # "file: what was wrong" of each photograph left out

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def values(self, index: Sequence[int] | Tensor) -> Tensor:
        """Give some photographs as float32 (b, 3, y, x) in [-1, 1]."""
        return to_values(self.pixels[torch.as_tensor(index)])

    def measurement(
        self,
        index: Sequence[int] | Tensor,
        *,
        law: MaskLaw | None = None,
        noise_std: float = 0.0,
        seed: int = 0,
        target: bool = True,
    ) -> Measurement:
        """Make a measurement of some photographs, corrupted in the same way whenever it is made.

        Parameters
        ----------
        index
            Which of them, (b,).
        law
            Of the masks, one for each photograph by its name; nothing is dropped without one.
        noise_std
            Standard deviation of white noise, fixed for each photograph by its name. What the measurement states as
            its own ``noise_std`` also holds the rounding to 8 bits.
        seed
            Of masks and noise, together with the names.
        target
            Whether the clean photographs (b, 3, y, x) go along as the target.
        """
        places = torch.as_tensor(index).tolist()
        clean = self.values(places)
        names = tuple(self.names[place] for place in places)
        parts = [_corrupted(image, name, law, noise_std, seed) for image, name in zip(clean, names, strict=True)]
        mask = torch.stack([mask for _, mask in parts])
        return Measurement(
            torch.stack([values for values, _ in parts]),
            mask,
            Identity(),
            noise_std=torch.full((len(clean), 1, 1, 1), math.hypot(noise_std, ROUNDING)),
            scale=torch.ones(len(clean), 1, 1, 1),
            source=names,
            target=clean if target else None,
            full_scale=1.0,
        )


def to_values(pixels: Tensor) -> Tensor:
    """Turn bytes into float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(values: Tensor) -> Tensor:
    """Turn values in [-1, 1] into bytes, rounded; what lies outside becomes 0 or 255."""
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def read_photos(
    path: str | Path | Sequence[str | Path],
    *,
    size: int | None = None,
    split: Split = "all",
    fit: Fit = "crop",
    faulty: Faulty = "refuse",
) -> Photos:
    """Read RGB photographs into memory.

    Parameters
    ----------
    path
        Folders with images in them or in their sub-folders, zip files of such, npz files with ``images`` (n, y, x, 3)
        uint8 and, if they like, ``source`` (n,), their names, and ``split`` (n,), 0 for training; or single images.
    size
        Rows and columns they are brought to by the mean over areas (Pillow's box filter: of the pixels whose middle is
        in each); never enlarged. Without it, the size of their squares, which must then be the same for all.
    split
        "train", "test" or "all" of them. By the ``split`` of an npz; else by the last number in each file's name, or,
        where some name has none, by the place in the sorted list: 0 .. 999 are test images (FFHQ's convention).
    fit
        "crop": the largest square in the middle of each image; "exact": images that are not square, or, with ``size``,
        not of that size, are at fault.
    faulty
        What to do with images that are damaged, grey, transparent, too small or not ``fit``: "refuse" the whole, or
        "skip" them with a warning.

    Raises
    ------
    InputError
        If nothing is found, two photographs have one name, or one is at fault; names the file.
    """
    _check_choice("split", split, ("all", "train", "test"))
    _check_choice("fit", fit, ("crop", "exact"))
    _check_choice("faulty", faulty, ("refuse", "skip"))
    if size is not None and size < 1:
        raise InputError(f"photographs of {size} pixels", mend="give a size of 1 or more")
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(one) for one in path]
    wanted = [
        (container / entry.name if entry.name != container.name else container, entry)
        for container in paths
        for entry in pictures(container)
        if split == "all" or entry.held_out == (split == "test")
    ]
    pixels = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    names: list[str] = []
    skipped: list[str] = []
    for where, entry in wanted:
        try:
            image = torch.from_numpy(square(entry, size, fit)).permute(2, 0, 1)
            if not names:
                pixels = torch.empty(len(wanted), *image.shape, dtype=torch.uint8)
            if image.shape != pixels.shape[1:]:
                raise FaultError(f"is {len(image[0])} pixels wide where others are {pixels.shape[-1]}")
        except FaultError as fault:
            if faulty == "refuse":
                mend = "mend it or leave it out (faulty: skip)"
                raise InputError(str(fault), mend=mend, path=where) from fault
            skipped.append(f"{where}: {fault}")
        else:
            pixels[len(names)] = image
            names.append(entry.name)
    if skipped:
        text = f"{len(skipped)} photographs are left out, the first is {skipped[0]}"
        warnings.warn(text, InputWarning, stacklevel=2)
    given = ", ".join(map(str, paths))
    if not names:
        of = f" of the split '{split}'" if split != "all" else ""
        mend = "give a folder, zip or npz of RGB images" + (", or split: all" if of else "")
        raise InputError(f"no photograph{of} in {given or 'an empty list'}", mend=mend)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two photographs are called {twice}", mend="rename one: masks go by name", path=given)
    return Photos(pixels[: len(names)], tuple(names), tuple(skipped))


@dataclass
class _PhotoData:
    """Photographs as training data, read on first use; a subclass says what is measured of them."""

    path: str | Sequence[str]  # folder, zip, npz or several of them
    size: int | None = None  # rows and columns, by the mean over areas; None: as they are
    split: Split = "train"  # see read_photos
    fit: Fit = "crop"  # see read_photos
    faulty: Faulty = "refuse"  # see read_photos

    @cached_property
    def photos(self) -> Photos:
        """What is in memory."""
        return read_photos(self.path, size=self.size, split=self.split, fit=self.fit, faulty=self.faulty)

    def __len__(self) -> int:
        return len(self.photos)

    def batch(self, rng: Generator, *, pixels: int) -> Measurement:
        """Draw random photographs, as many as make about ``pixels`` places and at least one; without target."""
        total, (height, width) = len(self.photos), self.photos.shape
        n = max(1, min(total, round(pixels / (height * width))))
        return self._measured(torch.randperm(total, generator=rng)[:n])

    def _measured(self, chosen: Tensor) -> Measurement:
        raise NotImplementedError


@dataclass
class FullPhotos(_PhotoData):
    """Whole photographs without noise, for priors of clean images: what the others are compared with."""

    def _measured(self, chosen: Tensor) -> Measurement:
        return self.photos.measurement(chosen, target=False)


@dataclass
class TrainingPhotos(_PhotoData):
    """Photographs each measured once, as training data: one fixed mask, and noise if any, for each by its name.

    What its mask leaves out of a photograph is not even kept in memory.
    """

    law: MaskLaw = field(default_factory=RandomTiles)  # of the masks
    noise_std: float = 0.0  # of white noise
    seed: int = 0  # of masks and noise, together with the names

    @cached_property
    def photos(self) -> Photos:
        """The measured pixels; all others are 0.

        Raises
        ------
        InputError
            If the law never keeps some place.
        """
        whole = read_photos(self.path, size=self.size, split=self.split, fit=self.fit, faulty=self.faulty)
        require_coverage(self.law, whole.shape)
        for image, name in zip(whole.pixels, whole.names, strict=True):
            image *= _mask(name, self.law, whole.shape, self.seed)[0]
        return whole

    def _measured(self, chosen: Tensor) -> Measurement:
        return self.photos.measurement(chosen, law=self.law, noise_std=self.noise_std, seed=self.seed, target=False)


def _mask(name: str, law: MaskLaw | None, shape: tuple[int, int], seed: int) -> tuple[Tensor, Generator]:
    """Draw the mask (1, y, x) of a photograph, and give the generator that draws its noise next."""
    rng = Generator().manual_seed(slice_seed(name, seed))
    return (torch.ones((1, *shape), dtype=torch.bool) if law is None else law.draw(shape, rng)), rng


def _corrupted(image: Tensor, name: str, law: MaskLaw | None, noise_std: float, seed: int) -> tuple[Tensor, Tensor]:
    """Give what is measured (3, y, x) of one photograph, and its mask (1, y, x)."""
    mask, rng = _mask(name, law, (image.shape[-2], image.shape[-1]), seed)
    noisy = image + noise_std * normal_like(image[None], [rng])[0] if noise_std > 0 else image
    return Subsample(mask)(noisy), mask


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"photographs have no {name} '{value}'", mend=f"one of {', '.join(known)}")
