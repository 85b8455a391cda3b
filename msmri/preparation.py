"""How a slice of a file becomes a measurement: read, cropped, undersampled, with coil maps of its own."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from msmri.errors import InputError, InputWarning
from msmri.io.fastmri import Scan, open_scan
from msmri.io.kspace import centre_crop, undersample
from msmri.io.maps import OTHER, SHOWN, checksum, differences, maps_settings, same_maps
from msmri.io.output import read_maps
from msmri.measurement import Measurement
from msmri.metrics import psnr
from msmri.physics.coils import compress_coils, estimate_noise_std, root_sum_of_squares
from msmri.physics.espirit import Espirit
from msmri.physics.fourier import ifft2c
from msmri.physics.masks import MaskLaw, slice_seed
from msmri.physics.operators import CoilFourier
from msmri.tensors import Mask, normal_like


@dataclass(frozen=True)
class Preparation:
    """How a slice of a file becomes a measurement; the same for every file of a run."""

    law: MaskLaw | Mask | None = None  # undersamples fully sampled scans: a law, or one mask (1, 1 or ky, kx) for all
    seed: int = 0  # of masks and samples, together with the name of the slice
    mask_per: Literal["slice", "file"] = "slice"  # a mask drawn for every slice, or one for all slices of a file
    noise: float = 0.0  # added to fully sampled scans: std of each real component over the brightest pixel of the slice
    sets: int | Literal["auto"] = "auto"  # sets of coil maps, see Espirit
    maps: Path | None = None  # file of coil maps, or directory with one file a scan; without it, ESPIRiT
    crop_to: int | None = None  # crop k-space to this many rows and columns: a trial at low resolution
    coils: int | None = None  # compress to this many virtual coils
    device: str = "cpu"
    espirit: Espirit = field(default_factory=Espirit)  # how maps are estimated, the number of their sets aside
    trust_maps: bool = False  # use ``maps`` even if they were made from other data than is reconstructed

    def describe(self) -> dict[str, Any]:
        """Tell all that decides the result, the device not among it."""
        law: Any = self.law
        if isinstance(law, MaskLaw):
            law = {"law": law.name, **{f.name: getattr(law, f.name) for f in dataclasses.fields(law)}}
            law |= {"one mask for each": self.mask_per}
        maps = str(self.maps) if self.maps is not None else "ESPIRiT"
        told = {name: getattr(self, name) for name in ("seed", "sets", "crop_to", "coils")}
        told |= {"noise": self.noise} if self.noise > 0 else {}
        chosen = dataclasses.asdict(replace(self.espirit, sets=1))
        usual = dataclasses.asdict(Espirit())
        other = {name: value for name, value in chosen.items() if value != usual[name]}
        return {"mask": law, "maps": maps, **told, **({"espirit": other} if other else {})}


def require_sampling(scan: Scan, preparation: Preparation) -> None:
    """Check that a scan needs a reconstruction and that nobody undersamples it twice.

    Raises
    ------
    InputError
        If it is fully sampled and no mask is given, or undersampled already and one is given.
    """
    if preparation.law is None and not scan.is_undersampled:
        mend = "give --mask random-lines --acceleration 4 to undersample it and score the result"
        raise InputError("is fully sampled, so there is nothing to reconstruct", mend=mend, path=scan.path)
    if preparation.law is not None and scan.is_undersampled:
        mend = "leave out --mask to reconstruct it as it was measured"
        raise InputError("is undersampled already, so it cannot be given a mask", mend=mend, path=scan.path)


def read_slice(scan: Scan, index: int, preparation: Preparation) -> Measurement:
    """Read one slice, make it noisier and undersample it; no coil maps yet.

    The target (1, y, x) is the file's own, or, where it has none or k-space is cropped, the root-sum-of-squares image
    of the fully sampled slice; None for undersampled scans without one. Images are compared with it after
    :func:`to_output`.
    """
    measurement = scan.read(index)
    if preparation.crop_to is not None:
        measurement = _crop_kspace(measurement, preparation.crop_to)
    if measurement.target is None and not scan.is_undersampled:
        image = root_sum_of_squares(ifft2c(measurement.values))
        measurement = replace(measurement, target=to_output(image, scan, preparation))
    law = preparation.law
    if law is not None:
        if isinstance(law, MaskLaw):
            name = measurement.source[0] if preparation.mask_per == "slice" else scan.path.name
            rng = Generator().manual_seed(slice_seed(name, preparation.seed))
            law = law.draw((measurement.values.shape[-2], measurement.values.shape[-1]), rng)
        measurement = _noisier(measurement, preparation)
        measurement = undersample(measurement, law.reshape(-1, 1, *law.shape[-2:]))
    if preparation.coils is not None and preparation.coils < measurement.values.shape[1]:
        measurement = replace(measurement, values=compress_coils(measurement.values, preparation.coils)[0])
    return measurement


def calibrate(measurement: Measurement, scan: Scan, index: int, preparation: Preparation) -> Measurement:
    """Add noise level and coil maps, both from the measured data of the slice alone, and move it to the device.

    Raises
    ------
    InputError
        If given maps do not fit the slice, or were made from other data, see :func:`check_maps`.
    """
    values, mask = measurement.values.to(preparation.device), measurement.mask.to(preparation.device)
    if preparation.maps is None:
        maps = replace(preparation.espirit, sets=preparation.sets)(values, mask)
    else:
        path = maps_file(preparation.maps, scan.path)
        check_maps(scan, preparation)
        maps = read_maps(path, index=index)[None].to(values)
        if maps.shape[2:] != values.shape[1:]:
            raise InputError(
                f"maps of {tuple(maps.shape[2:])} (coil, y, x) do not fit k-space of {tuple(values.shape[1:])}",
                mend="make them with msmri coils and the same --crop-to and --coils",
                path=path,
            )
    noise = estimate_noise_std(values, mask)[:, None, None, None]
    return replace(measurement, values=values, mask=mask, encoding=CoilFourier(maps), noise_std=noise)


def made_from(scan: Scan, preparation: Preparation) -> dict[str, Any]:
    """Tell what coil maps of a scan are made from: its name and checksum, and the preparation as far as it matters."""
    told = {"input": checksum(scan.path), "name": scan.path.name, **preparation.describe()}
    if preparation.crop_to is not None and preparation.crop_to >= max(scan.kspace_shape[-2:]):
        told["crop_to"] = None
    if preparation.coils is not None and preparation.coils >= scan.n_coils:
        told["coils"] = None
    return same_maps(told)


def check_maps(scan: Scan, preparation: Preparation) -> dict[str, Any] | None:
    """Check that given coil maps come from the data that is reconstructed; tell for the manifest what they come from.

    Maps of another mask, and of all lines most of all, know more than the measurement does and flatter its scores:
    they are taken with a warning, and so are maps that do not tell. With ``trust_maps`` there is no warning, and
    maps of another scan are taken, too.

    Returns
    -------
    dict or None
        The file, what it says it was made from, and a note where that differs or is missing; None without maps.

    Raises
    ------
    InputError
        If the maps were made from another scan, or with other cropping, coils or number of sets.
    """
    if preparation.maps is None:
        return None
    path = maps_file(preparation.maps, scan.path)
    stored = maps_settings(path)
    told: dict[str, Any] = {"file": str(path), "made from": stored}
    if stored is None:
        warnings.warn(
            f"{path} does not tell what its coil maps were made from: they are used unchecked",
            InputWarning,
            stacklevel=2,
        )
        return {**told, "note": "the maps do not tell what they were made from; used unchecked"}
    wanted = made_from(scan, preparation)
    differing, shown = (differences(stored, wanted, keys=keys) for keys in (OTHER, SHOWN))
    if preparation.sets != "auto" and stored.get("sets") != preparation.sets:
        sets = read_maps(path, index=0).shape[0]
        differing += [f"sets {sets}, not {preparation.sets}"] if sets != preparation.sets else []
    if not differing and not shown:
        return told
    if preparation.trust_maps:
        return {**told, "note": f"used as they are, though made from other data: {'; '.join(differing + shown)}"}
    if not differing:
        note = f"made from other measurements of the scan than are reconstructed ({'; '.join(shown)})"
        warnings.warn(f"{path}: the coil maps were {note}, which may flatter scores", InputWarning, stacklevel=2)
        return {**told, "note": note}
    raise InputError(
        f"these coil maps were made from other data than is reconstructed ({'; '.join(differing)})",
        mend="make them with msmri coils and the same options, or use them with --maps-as-they-are",
        path=path,
    )


def maps_file(maps: Path, scan: Path) -> Path:
    """Name the file of coil maps that belongs to a scan: ``maps`` itself, or the one of the scan's name inside it."""
    return maps / f"{scan.stem}.h5" if maps.is_dir() else maps


def to_output(image: Tensor, scan: Scan, preparation: Preparation) -> Tensor:
    """Crop images (..., y, x) to the size that is written: the scan's output, or all of a cropped matrix."""
    return image if preparation.crop_to is not None else scan.crop_to_output(image)


def measurements(path: str | Path, preparation: Preparation, slices: Sequence[int] | None = None) -> list[Measurement]:
    """Prepare slices of a file, all of them by default, with coil maps and targets: for tuning and for experiments."""
    with naming(path), open_scan(path) as scan:
        require_sampling(scan, preparation)
        return [
            calibrate(read_slice(scan, index, preparation), scan, index, preparation)
            for index in (range(scan.n_slices) if slices is None else slices)
        ]


def join(slices: Sequence[Measurement]) -> Measurement:
    """Make one batch of slices of one size with coil maps; they lose their targets."""
    maps = [one.encoding.maps for one in slices if isinstance(one.encoding, CoilFourier)]
    if len(maps) != len(slices):
        raise ValueError("slices without coil maps cannot be joined")

    def of_each(name: str) -> Tensor:
        values = [torch.as_tensor(getattr(one, name)).to(one.values.real) for one in slices]
        return torch.cat([value.expand(len(one.values), 1, 1, 1) for value, one in zip(values, slices, strict=True)])

    return replace(
        slices[0],
        values=torch.cat([one.values for one in slices]),
        mask=torch.cat([one.mask for one in slices]),
        encoding=CoilFourier(torch.cat(maps)),
        noise_std=of_each("noise_std"),
        scale=of_each("scale"),
        source=tuple(name for one in slices for name in one.source),
        target=None,
    )


def cropped_psnr(target: Tensor, image: Tensor) -> float:
    """PSNR of one slice after cropping the image (y, x) to the size of the target, in dB."""
    return psnr(target, centre_crop(image, (target.shape[-2], target.shape[-1])))


cropped_psnr.__name__ = "psnr"  # what tables of tuning call it


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name into errors that do not name one."""
    try:
        yield
    except InputError as error:
        if error.path is not None and str(error.path) in str(error):
            raise
        raise InputError(error.problem, mend=error.mend, path=path) from error


def _noisier(measurement: Measurement, preparation: Preparation) -> Measurement:
    """Add white noise, drawn by the name of the slice, to one fully sampled slice."""
    if preparation.noise == 0:
        return measurement
    values = measurement.values
    rng = Generator().manual_seed(slice_seed(f"{measurement.source[0]} noise", preparation.seed))
    std = preparation.noise * root_sum_of_squares(ifft2c(values)).max()
    return replace(measurement, values=values + std * normal_like(values, [rng]))


def _crop_kspace(measurement: Measurement, size: int) -> Measurement:
    """Crop k-space to its centre, at most ``size`` rows and columns, keeping the mean intensity; drops the target."""
    rows, columns = measurement.values.shape[-2:]
    height, width = min(size, rows), min(size, columns)
    top, left = rows // 2 - height // 2, columns // 2 - width // 2
    kept = (..., slice(top, top + height), slice(left, left + width))
    mask = measurement.mask[kept] if measurement.mask.shape[-2] > 1 else measurement.mask[..., left : left + width]
    values = measurement.values[kept] * (height * width / (rows * columns)) ** 0.5
    return replace(measurement, values=values, mask=mask, target=None)
