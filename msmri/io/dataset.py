"""Scans as training data: batches of equally sized slices, coil maps computed once, nothing unmeasured."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Generator, Tensor

from msmri.errors import InputError, InputWarning
from msmri.io.fastmri import Scan, list_scans, open_scan
from msmri.io.kspace import undersample
from msmri.io.output import open_hdf5, read_maps, read_reconstruction, write_maps
from msmri.measurement import Measurement
from msmri.physics.coils import compress_coils, estimate_noise_std
from msmri.physics.espirit import Espirit
from msmri.physics.fourier import fft2c
from msmri.physics.masks import MaskLaw, RandomLines, draw_masks, slice_seed
from msmri.physics.operators import CoilFourier, Subsample
from msmri.tensors import Mask

MANY_SLICES = 20  # of which some should measure every line


@dataclass
class _Scan:
    held: list[Tensor]  # complex64 values of each slice, scaled, in the order of ``places``: the rest is zero
    places: Tensor  # what is held of each slice: its mask, or more where batches have masks of their own
    shape: tuple[int, int, int, int]  # (slice, coil, ky, kx)
    mask: Tensor
    maps: Tensor  # half precision real view (slice, set, coil, y, x, 2)
    noise_std: Tensor
    scale: Tensor
    source: tuple[str, ...]

    def values(self, chosen: Tensor) -> Tensor:
        """Give the k-space (len(chosen), coil, ky, kx) held of some slices, zero elsewhere."""
        values = torch.zeros(len(chosen), *self.shape[1:], dtype=torch.complex64)
        for target, index in zip(values, chosen.tolist()):
            target[self.places[index].expand_as(target)] = self.held[index]
        return values


@dataclass
class _Scans:
    """Slices of multi-coil scans, read on first use and kept in memory; a subclass says which scans it takes."""

    path: str | Sequence[str]  # folder or files
    cache: str | None = None  # folder for the coil maps; without it they are computed anew in every run
    max_coils: int = 8  # coils are compressed to so many
    calibration: Espirit = field(default_factory=lambda: Espirit(crop=0.0))
    scans_per_batch: int = 1  # so many scans share a batch, as far as their matrices and coils agree

    map_files: ClassVar[str] = "{}_maps.h5"  # in the cache

    def __post_init__(self) -> None:
        paths = [self.path] if isinstance(self.path, (str, Path)) else list(self.path)
        self.files = list_scans(paths)
        stems = [path.stem for path in self.files]
        if self.cache is not None and len(set(stems)) < len(stems):
            twice = next(stem for stem in stems if stems.count(stem) > 1)
            mend = "rename one, because the cache of coil maps goes by name"
            raise InputError(f"two scans are called {twice}", mend=mend, path=self.cache)
        self._scans: dict[int, _Scan] = {}

    def __len__(self) -> int:
        return len(self.files)

    def _slices(self, path: Path) -> list[Measurement]:
        """Read all slices of a file."""
        with open_scan(path) as opened:
            scan = replace(opened, target_name=None)
            slices = [scan.read(index) for index in range(scan.n_slices)]
            self._check(scan, slices)
        return slices

    def _check(self, scan: Scan, slices: list[Measurement]) -> None:
        """Refuse a scan that is not of the kind asked for; ``slices`` are all its slices."""
        raise NotImplementedError

    def _first(self, item: Measurement) -> Measurement:
        """Give of a slice as read what maps, scale, noise level and spectrum come from."""
        return item

    def _held(self, item: Measurement, first: Measurement) -> Measurement:
        """Give of a slice as read what is kept in memory for batches."""
        return first

    def _masks(self, scan: _Scan, chosen: Tensor, rng: Generator) -> Mask:
        """Give the masks (len(chosen), 1, 1 or ky, kx) of slices in a batch, ``rng`` left as it is."""
        return scan.mask[chosen]

    def _complete(self) -> None:
        """Look at the scans together, once all of them are in memory."""

    def _maps_file(self, stem: str) -> str:
        """Name the file of a scan's coil maps in the cache."""
        return self.map_files.format(stem)

    def _load(self, number: int) -> _Scan:
        if number in self._scans:
            return self._scans[number]
        path = self.files[number]
        slices = self._slices(path)
        first = [self._first(item) for item in slices]
        held = [self._held(item, taken) for item, taken in zip(slices, first)]
        values, kept = (torch.cat([item.values for item in items]) for items in (first, held))
        mask, places = (torch.cat([item.mask for item in items]) for items in (first, held))
        if values.shape[1] > self.max_coils:
            values, matrix = compress_coils(values, self.max_coils)
            values = Subsample(mask)(values)
            kept = Subsample(places)(torch.einsum("bvc,bcyx->bvyx", matrix, kept))
        whole = Measurement(values, mask)
        scale = whole.centre_scale()
        store = Path(self.cache) / self._maps_file(path.stem) if self.cache else None
        if store is not None and store.exists():
            maps = read_maps(store)
            if (len(maps), *maps.shape[2:]) != tuple(values.shape):
                mend = "delete the file, or choose another folder for the cache"
                raise InputError(f"maps {tuple(maps.shape)} do not fit {path}", mend=mend, path=store)
        else:
            maps = self.calibration(values, mask)
            if store is not None:
                store.parent.mkdir(parents=True, exist_ok=True)
                write_maps(store, maps)
        noise = estimate_noise_std(values, mask).reshape(-1, 1, 1, 1) / scale
        kept = kept / scale
        loaded = _Scan(
            [each[where.expand_as(each)].to(torch.complex64) for each, where in zip(kept, places)],
            places,
            (values.shape[0], values.shape[1], values.shape[2], values.shape[3]),
            mask,
            torch.view_as_real(maps).half(),
            noise.float(),
            scale,
            tuple(source for item in slices for source in item.source),
        )
        self._scans[number] = loaded
        if len(self._scans) == len(self.files):
            self._complete()
        return loaded

    def batch(self, rng: Generator, *, pixels: int) -> Measurement:
        """Draw slices of one or more random scans, as many as make about ``pixels`` k-space places and at least one.

        Of the ``scans_per_batch`` scans drawn, those that differ from the first in matrix, coils or sets are left out.
        """
        numbers = torch.randint(0, len(self.files), (max(1, self.scans_per_batch),), generator=rng).tolist()
        drawn = [self._load(number) for number in dict.fromkeys(numbers)]
        kinds = [(*scan.shape[1:], scan.maps.shape[1]) for scan in drawn]  # coils, matrix, sets
        alike = [scan for scan, kind in zip(drawn, kinds) if kind == kinds[0]]
        total = round(pixels / math.prod(drawn[0].shape[-2:]))
        parts = []
        for place, scan in enumerate(alike):
            share = total // len(alike) + (place < total % len(alike))
            chosen = torch.randperm(scan.shape[0], generator=rng)[: max(1, share)]
            parts.append((scan, chosen, self._masks(scan, chosen, rng)))
        mask = torch.cat([masks for _, _, masks in parts])
        return Measurement(
            Subsample(mask)(torch.cat([scan.values(chosen) for scan, chosen, _ in parts])),
            mask,
            CoilFourier(torch.view_as_complex(torch.cat([scan.maps[chosen] for scan, chosen, _ in parts]).float())),
            noise_std=torch.cat([scan.noise_std[chosen] for scan, chosen, _ in parts]),
            scale=torch.cat([scan.scale[chosen] for scan, chosen, _ in parts]),
            source=tuple(scan.source[int(i)] for scan, chosen, _ in parts for i in chosen),
        )

    def spectrum(self, rng: Generator, *, bins: int = 48, scans: int = 60) -> Tensor:
        """Measure the power spectrum of the data: variance of each real component of image k-space by radius.

        Averages measured places of randomly chosen scans, less their noise; radius 0..1.5 of the Nyquist frequency.
        """
        power, count = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)
        chosen = torch.randperm(len(self.files), generator=rng)[:scans]
        for number in chosen.tolist():
            scan = self._load(number)
            height, width = scan.shape[-2:]
            rows = (torch.arange(height) - height // 2) / (height / 2)
            columns = (torch.arange(width) - width // 2) / (width / 2)
            radius = (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt()
            place = (radius / 1.5 * (bins - 1)).round().long().clamp(max=bins - 1)
            mask = scan.mask.expand(-1, -1, height, width)[:, 0]
            values = scan.values(torch.arange(scan.shape[0]))
            energy = values.abs().square().sum(1) / 2
            noise = scan.shape[1] * scan.noise_std[:, 0].square()
            energy = (energy - noise).double()
            for index in range(len(energy)):
                where = place[mask[index]]
                power.index_add_(0, where, energy[index][mask[index]])
                count.index_add_(0, where, torch.ones_like(where, dtype=torch.float64))
        mean = power / count.clamp_min(1)
        floor = 1e-6 * mean.max()
        for index in range(1, bins):  # bins that no line reached take the value of their inner neighbour
            if count[index] == 0 or mean[index] < floor:
                mean[index] = max(float(mean[index - 1]) * 0.8, float(floor))
        return mean.float()


@dataclass
class TrainingScans(_Scans):
    """Slices of undersampled multi-coil scans, read on first use and kept in memory.

    Each scan must be undersampled already, with the mask in the file or zeros in k-space: the mask of a slice is part
    of the data and is the same in every epoch. References in the files are not read. Maps come from each slice's own
    calibration lines, the scale from its centre lines, the noise level from its measured high frequencies.
    """

    law: MaskLaw | None = None  # that the masks were drawn by: told to samplers by the weights, not used in training

    def _check(self, scan: Scan, slices: list[Measurement]) -> None:
        if not scan.is_undersampled:
            raise InputError(
                "the scan is fully sampled",
                mend="undersample it once before training, as docs/train.md shows",
                path=scan.path,
            )
        complete = [index for index, item in enumerate(slices) if _is_complete(item, scan)]
        if complete:
            mend = "undersample it or leave it out"
            raise InputError(f"slice {complete[0]} is fully sampled", mend=mend, path=scan.path)

    def _complete(self) -> None:
        """Warn of lines between measured ones that none of many slices measured: nothing supervises them."""
        masks: dict[int, list[Tensor]] = {}
        for scan in self._scans.values():
            columns = scan.mask.flatten(1, -2).any(1)
            masks.setdefault(columns.shape[-1], []).append(columns)
        for width, parts in masks.items():
            slices = torch.cat(parts)
            inner = slices.any(0).nonzero().flatten()
            missing = int(inner[-1] - inner[0] + 1 - len(inner)) if len(inner) else 0
            if missing and len(slices) >= MANY_SLICES:
                warnings.warn(
                    f"{missing} of {width} lines are measured in none of {len(slices)} slices: nothing supervises them "
                    "in training; add scans with other masks",
                    InputWarning,
                    stacklevel=2,
                )


@dataclass
class FullScans(_Scans):
    """Slices of fully sampled multi-coil scans, for supervised training and for priors of clean images.

    What the methods of this package are compared with, never what they learn from. Each batch has a mask that is True
    everywhere but in margins that the scan did not reach; who trains on it undersamples it. Coil maps come from the
    central 24 x 24 places alone (``calibration.max_calibration``), as if the rest had not been sampled, and the scale
    from the centre lines. In the cache the maps have names of their own, so that it may be shared with
    :class:`TrainingScans`.
    """

    map_files: ClassVar[str] = "{}_full_maps.h5"

    def _check(self, scan: Scan, slices: list[Measurement]) -> None:
        missing = [index for index, item in enumerate(slices) if not _is_complete(item, scan)]
        if missing:
            mend = "give fully sampled scans, or read undersampled ones by TrainingScans"
            raise InputError(f"slice {missing[0]} is undersampled", mend=mend, path=scan.path)


@dataclass
class ReconstructedScans(_Scans):
    """Slices as an earlier prior completed them: what ``recipes/complete_scans.py`` made of undersampled scans.

    One sample of the posterior of every training slice, from its own measured lines, in place of a clean image: with
    these as data the prior of the next round is fitted to all that was measured, by expectation maximisation (Rozet et
    al. 2024). Sampled, not averaged: means of many samples are too smooth to be taken for images. Results of ``msmri
    recon --samples 1`` are such samples with ``msm.conditional_mean=0`` and ``msm.likelihood=none`` alone.

    Each slice is the k-space of its complex image, as measured by one coil that sees all alike. ``path`` holds the h5
    files; with several folders, such as of several seeds, each slice is there as often. ``calibration`` makes the map,
    of magnitude 1, and so says which phase the image is left with.
    """

    law: MaskLaw | None = None  # of the masks that samplers are to use: all of k-space is known here

    map_files: ClassVar[str] = "{}_reconstructed_maps.h5"

    def _slices(self, path: Path) -> list[Measurement]:
        images = read_reconstruction(path, "reconstruction_complex")
        if not images.is_complex() or not bool(torch.isfinite(torch.view_as_real(images)).all()):
            mend = "reconstruct it again by msmri recon"
            raise InputError("reconstruction_complex does not hold finite complex images", mend=mend, path=path)
        with open_hdf5(path) as file:
            averaged = "reconstruction_std" in file
        if averaged:
            mend = "reconstruct with --samples 1"
            raise InputError("holds means of several samples, which are smoother than images", mend=mend, path=path)
        everything = torch.ones(1, 1, 1, images.shape[-1], dtype=torch.bool)
        kspace = fft2c(images)[:, None, None]
        return [Measurement(one, everything, source=(f"{path.name}#{index}",)) for index, one in enumerate(kspace)]


@dataclass
class UndersampledScans(FullScans):
    """Slices of fully sampled scans that are undersampled as they are read, one mask a slice: as TrainingScans.

    The mask of a slice follows from its name and ``seed``, and nothing else of the slice is kept: batches are those
    that :class:`TrainingScans` gives of the same scans undersampled once, as docs/train.md shows.

    With ``redraw`` the slice is kept whole and every batch undersamples it anew, as the released code of MSM does:
    over many epochs the loss then sees nearly all of it, though never two masks at once. It is there to tell what
    that changes. Maps, scale, noise level and spectrum still come from the slice's first mask alone, and the
    generator of a batch moves on as without, so that the masks are all that differs.
    """

    law: MaskLaw = field(default_factory=lambda: RandomLines(acceleration=4.0))  # of the masks
    seed: int = 0  # of the masks, together with the name of the slice
    redraw: bool = False  # a new mask for every slice of every batch

    def _draw(self, item: Measurement) -> Mask:
        rng = Generator().manual_seed(slice_seed(item.source[0], self.seed))
        return draw_masks(self.law, (item.values.shape[-2], item.values.shape[-1]), [rng])

    def _first(self, item: Measurement) -> Measurement:
        return undersample(item, self._draw(item))

    def _held(self, item: Measurement, first: Measurement) -> Measurement:
        return item if self.redraw else first

    def _masks(self, scan: _Scan, chosen: Tensor, rng: Generator) -> Mask:
        if not self.redraw:
            return scan.mask[chosen]
        now = Generator()
        now.set_state(rng.get_state())
        step = int(torch.randint(0, 2**62, (), generator=now))
        seeds = [slice_seed(f"{scan.source[int(i)]}/{step}", self.seed) for i in chosen]
        masks = draw_masks(self.law, scan.shape[-2:], [Generator().manual_seed(seed) for seed in seeds])
        return masks & scan.places[chosen]

    def _maps_file(self, stem: str) -> str:
        return f"{stem}_{self.law.name}_{slice_seed(repr(self.law), self.seed):016x}_maps.h5"


def _is_complete(item: Measurement, scan: Scan) -> bool:
    """Tell whether a slice was sampled everywhere between the margins of its scan."""
    return bool((item.mask | ~scan.acquired).all())
