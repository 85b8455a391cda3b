"""Scans as training data: batches of equally sized slices, coil maps computed once, nothing unmeasured."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Generator, Tensor

from msmri.errors import InputError
from msmri.io.fastmri import Scan, list_scans, open_scan
from msmri.io.output import read_maps, write_maps
from msmri.measurement import Measurement
from msmri.physics.coils import compress_coils, estimate_noise_std
from msmri.physics.espirit import Espirit
from msmri.physics.operators import CoilFourier


@dataclass
class _Scan:
    measured: list[Tensor]  # complex64 values of each slice, scaled, in the order of its mask: the rest is zero
    shape: tuple[int, int, int, int]  # (slice, coil, ky, kx)
    mask: Tensor
    maps: Tensor  # half precision real view (slice, set, coil, y, x, 2)
    noise_std: Tensor
    scale: Tensor
    source: tuple[str, ...]

    def values(self, chosen: Tensor) -> Tensor:
        """Give the k-space (len(chosen), coil, ky, kx) of some slices, zero where it was not measured."""
        values = torch.zeros(len(chosen), *self.shape[1:], dtype=torch.complex64)
        for target, index in zip(values, chosen.tolist()):
            target[self.mask[index].expand_as(target)] = self.measured[index]
        return values


@dataclass
class _Scans:
    """Slices of multi-coil scans, read on first use and kept in memory; a subclass says which scans it takes."""

    path: str | Sequence[str]  # folder or files
    cache: str | None = None  # folder for the coil maps; without it they are computed anew in every run
    max_coils: int = 8  # coils are compressed to so many
    calibration: Espirit = field(default_factory=lambda: Espirit(crop=0.0))

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

    def _check(self, scan: Scan, slices: list[Measurement]) -> None:
        """Refuse a scan that is not of the kind asked for; ``slices`` are all its slices."""
        raise NotImplementedError

    def _load(self, number: int) -> _Scan:
        if number in self._scans:
            return self._scans[number]
        path = self.files[number]
        with open_scan(path) as opened:
            scan = replace(opened, target_name=None)
            slices = [scan.read(index) for index in range(scan.n_slices)]
            self._check(scan, slices)
        values = torch.cat([item.values for item in slices])
        mask = torch.cat([item.mask for item in slices])
        if values.shape[1] > self.max_coils:
            values, _ = compress_coils(values, self.max_coils)
            values = torch.where(mask, values, torch.zeros((), dtype=values.dtype))
        whole = Measurement(values, mask)
        scale = whole.centre_scale()
        store = Path(self.cache) / self.map_files.format(path.stem) if self.cache else None
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
        values = values / scale
        loaded = _Scan(
            [each[measured.expand_as(each)].to(torch.complex64) for each, measured in zip(values, mask)],
            (values.shape[0], values.shape[1], values.shape[2], values.shape[3]),
            mask,
            torch.view_as_real(maps).half(),
            noise.float(),
            scale,
            tuple(source for item in slices for source in item.source),
        )
        self._scans[number] = loaded
        return loaded

    def batch(self, rng: Generator, *, pixels: int) -> Measurement:
        """Draw slices of one random scan, as many as make about ``pixels`` k-space places and at least one."""
        scan = self._load(int(torch.randint(0, len(self.files), (), generator=rng)))
        total, _, height, width = scan.shape
        n = max(1, min(total, round(pixels / (height * width))))
        chosen = torch.randperm(total, generator=rng)[:n]
        maps = torch.view_as_complex(scan.maps[chosen].float())
        return Measurement(
            scan.values(chosen),
            scan.mask[chosen],
            CoilFourier(maps),
            noise_std=scan.noise_std[chosen],
            scale=scan.scale[chosen],
            source=tuple(scan.source[int(i)] for i in chosen),
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


def _is_complete(item: Measurement, scan: Scan) -> bool:
    """Tell whether a slice was sampled everywhere between the margins of its scan."""
    return bool((item.mask | ~scan.acquired).all())
