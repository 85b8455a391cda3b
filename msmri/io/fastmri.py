"""Scans in the fastMRI HDF5 layout: opened with every check, read one slice at a time, written."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor

from msmri.errors import InputError, InputWarning
from msmri.io.header import Header, read_header, write_header
from msmri.io.kspace import centre_crop, crop_readout, is_zero_filled, normalise_mask
from msmri.io.layout import LAYOUT, find_target, kspace_shape
from msmri.io.output import atomic, open_hdf5
from msmri.measurement import Measurement
from msmri.tensors import Mask

STRAY_ZEROS = 0.01  # share of zeros among the sampled lines up to which they are measured zeros, not a 2-D mask
LEAST_PEAK = 1e-15  # of k-space; squares of less, or of more than its inverse, come near the ends of single precision


class Sampling(NamedTuple):
    """Mask (1 or ky, kx) of one slice, margins, and how many columns are called sampled but hold only zeros."""

    mask: np.ndarray
    left: int
    right: int
    empty: int

    @property
    def is_complete(self) -> bool:
        """Whether everything between the margins was sampled."""
        return bool(self.mask[:, self.left : self.mask.shape[1] - self.right].all())


@dataclass(frozen=True, eq=False)
class Scan:
    """An open scan; a context manager that closes its file.

    Parameters
    ----------
    path
        The file.
    kspace_shape
        (slices, coil, ky, kx) as stored; coil is 1 for single-coil files.
    mask
        Bool (1 or slices, 1 or ky, kx) if the file holds one, else None.
    header
        The parsed ISMRMRD header, or None.
    attributes
        The attributes of the file, such as acquisition and patient_id.
    target_name
        Dataset of reference images, or None.
    target_shape
        (y, x) of the reference images, or None.
    crop_readout
        Whether :meth:`read` removes readout oversampling.
    """

    path: Path
    kspace_shape: tuple[int, int, int, int]
    mask: np.ndarray | None
    header: Header | None
    attributes: dict[str, Any]
    target_name: str | None
    target_shape: tuple[int, int] | None
    crop_readout: bool
    _file: h5py.File = field(repr=False)

    def __enter__(self) -> "Scan":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def n_slices(self) -> int:
        """The number of slices."""
        return self.kspace_shape[0]

    @property
    def n_coils(self) -> int:
        """The number of coils."""
        return self.kspace_shape[1]

    @property
    def output_shape(self) -> tuple[int, int]:
        """(y, x) of the images to give back: the reference's, else the header's, else that of k-space."""
        matrix = self.kspace_shape[2:]
        if self.target_shape is not None:
            return self.target_shape
        if self.header is None:
            return matrix
        if self.header.encoded != matrix:  # somebody else's header: never trust it to enlarge the image
            return min(self.header.recon[0], matrix[0]), min(self.header.recon[1], matrix[1])
        return self.header.recon

    @cached_property
    def _probe(self) -> Sampling:
        """Sampling of the first usable slice, from the middle outwards."""
        problem: InputError | None = None
        middle = self.n_slices // 2
        for index in sorted(range(self.n_slices), key=lambda index: abs(index - middle)):
            try:
                sampling = self._sampling(self._values(index), index)
            except InputError as error:
                problem = problem or error
                continue
            if sampling.empty:
                _warn(
                    f"{self.path}: {sampling.empty} columns that the mask calls sampled hold only zeros, so they are "
                    "taken as not acquired",
                    depth=5,
                )
            return sampling
        raise problem or InputError("holds no slices", path=self.path)

    @property
    def padding(self) -> tuple[int, int]:
        """Number of zero-padded columns, never acquired, at the left and at the right of k-space."""
        return self._probe.left, self._probe.right

    @property
    def acquired(self) -> Mask:
        """Bool (1, 1, kx), False in the zero-padded margins: where an undersampling mask may sample."""
        n = self.kspace_shape[3]
        column = torch.arange(n)
        return ((column >= self.padding[0]) & (column < n - self.padding[1]))[None, None]

    @property
    def is_undersampled(self) -> bool:
        """Whether some of k-space between the margins was not sampled."""
        return not self._probe.is_complete

    def read(self, index: int) -> Measurement:
        """Read one slice in file units: values (1, coil, ky, kx), mask (1, 1, 1 or ky, kx), target (1, y, x).

        Where sampling is by whole columns, rows outside ``output_shape`` are cropped in the image domain, so that
        640 oversampled readout points become 320; a 2-D mask forbids it, and the slice keeps its matrix.

        Raises
        ------
        InputError
            If the slice cannot be read, is not finite, or holds nothing but zeros.
        """
        stored = self._values(index)
        sampling = self._sampling(stored, index)
        mask = torch.from_numpy(sampling.mask)[None, None]
        np.copyto(stored, 0, where=~sampling.mask)  # in place: k-space of all coils is large
        values = torch.from_numpy(stored)[None]
        if not bool(values.any()):
            raise InputError(
                f"slice {index} holds only zeros where the mask samples", mend="check the mask's order", path=self.path
            )
        target = self._target(index)
        if target is not None and not sampling.is_complete and is_zero_filled(values, target):
            _warn(
                f"{self.path}: {self.target_name} is the zero-filled reconstruction, so it is not used as a reference"
            )
            target = None
        if self.crop_readout and mask.shape[-2] == 1 and self.output_shape[0] < values.shape[-2]:
            values = crop_readout(values, self.output_shape[0])
        return Measurement(values, mask, source=(f"{self.path.name}#{index}",), target=target)

    def crop_to_output(self, image: Tensor) -> Tensor:
        """Crop images (..., y, x) to ``output_shape``; see :func:`centre_crop`."""
        return centre_crop(image, self.output_shape)

    def _values(self, index: int) -> np.ndarray:
        """Read and check k-space (coil, ky, kx) complex64 of one slice."""
        if not 0 <= index < self.n_slices:
            raise InputError(f"has no slice {index}", mend=f"it has slices 0 to {self.n_slices - 1}", path=self.path)
        try:
            values = self._file["kspace"][index]
        except OSError as error:
            raise InputError(
                f"slice {index} is damaged and cannot be read", mend="copy or download the file again", path=self.path
            ) from error
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(np.complex64, copy=False).reshape(self.kspace_shape[1:])
        if not np.isfinite(values).all():
            raise InputError(f"slice {index} holds NaN or infinite k-space", mend="leave it out", path=self.path)
        if not values.any():
            raise InputError(f"slice {index} holds only zeros", mend="leave it out", path=self.path)
        peak = float(max(values.real.max(), -values.real.min(), values.imag.max(), -values.imag.min()))
        if not LEAST_PEAK <= peak <= 1 / LEAST_PEAK:
            raise InputError(
                f"slice {index} holds k-space up to {peak:.1e}, whose squares leave single precision",
                mend="multiply k-space and targets by a number that brings it near 1",
                path=self.path,
            )
        return values

    def _sampling(self, values: np.ndarray, index: int) -> Sampling:
        """Tell mask and margins of one slice (coil, ky, kx) from the file's mask, the header and exact zeros."""
        nonzero: np.ndarray = np.zeros(values.shape[1:], dtype=bool)
        for coil in values:
            nonzero |= coil != 0
        columns: np.ndarray = np.any(nonzero, axis=0)
        n = len(columns)
        leading, trailing = int(columns.argmax()), int(columns[::-1].argmax())
        empty = 0
        if self.mask is not None:
            stored = self.mask[index if len(self.mask) > 1 else 0]
            wrong = np.flatnonzero(stored.any(0) & ~columns)
            empty, mask = len(wrong), stored & columns
            left = max(wrong[wrong < leading] + 1, default=0)
            right = max(n - wrong[wrong >= n - trailing], default=0)
        else:
            stray = 1.0 - nonzero[:, columns].mean()
            mask = columns[None] if stray <= STRAY_ZEROS else nonzero
            complete = bool(columns[leading : n - trailing].all())  # else outer zeros may be unsampled lines
            left, right = (leading, trailing) if complete else (0, 0)
        if self.header is not None and self.header.encoded[1] == n:  # believed only where the data are zero as well
            left = max(left, min(leading, self.header.padding_left))
            right = max(right, min(trailing, n - self.header.padding_right))
        return Sampling(mask, int(left), int(right), empty)

    def _target(self, index: int) -> Tensor | None:
        if self.target_name is None:
            return None
        target = torch.from_numpy(np.asarray(self._file[self.target_name][index], dtype=np.float32))[None]
        if bool(target.isfinite().all()):
            return target
        _warn(f"{self.path}: {self.target_name} of slice {index} is not finite, so it is not a reference", depth=4)
        return None


def open_scan(path: str | Path, *, crop_readout: bool = True) -> Scan:
    """Open a scan in the fastMRI layout and check its structure; slices are read later, one by one.

    Raises
    ------
    InputError
        If the file cannot be opened, or its k-space or mask has the wrong name, shape or type.
    """
    path = Path(path)
    file = open_hdf5(path)
    try:
        shape = kspace_shape(file, path)
        target_name, target_shape = find_target(file, path, shape)
        header = read_header(file, path)
        if header is not None and header.encoded != shape[2:]:
            _warn(f"{path}: ismrmrd_header tells of {header.encoded} k-space, but kspace is {shape[2:]}")
        return Scan(
            path=path,
            kspace_shape=shape,
            mask=normalise_mask(file["mask"][()], shape, path=path) if "mask" in file else None,
            header=header,
            attributes=dict(file.attrs),
            target_name=target_name,
            target_shape=target_shape,
            crop_readout=crop_readout,
            _file=file,
        )
    except BaseException:
        file.close()
        raise


def list_scans(paths: Iterable[str | Path]) -> list[Path]:
    """List files, and the ``*.h5`` files of directories (sorted, not those of sub-directories), each once.

    A file that does not exist stays in the list, so that opening it is reported while the others are still done.

    Raises
    ------
    InputError
        If nothing is found.
    """
    given = [Path(path) for path in paths]
    found: dict[Path, Path] = {}
    for path in given:
        inside = sorted(one for one in path.glob("*.h5") if not one.name.startswith(".")) if path.is_dir() else [path]
        for one in inside:
            found.setdefault(one.absolute(), one)
    if not found:
        raise InputError(f"no .h5 file in {', '.join(map(str, given)) or 'an empty list'}", mend="give scans to read")
    return list(found.values())


def write_scan(
    path: str | Path,
    kspace: Tensor | np.ndarray,
    *,
    mask: Tensor | np.ndarray | None = None,
    target: Tensor | np.ndarray | None = None,
    header: Header | str | None = None,
    attributes: Mapping[str, Any] | None = None,
    compress: bool = False,
) -> None:
    """Write a scan in the fastMRI layout, whole or not at all; an existing file is replaced.

    Parameters
    ----------
    path
        The file.
    kspace
        Complex (slices, coil, ky, kx), or (slices, ky, kx) for a single coil; written slice by slice.
    mask
        (kx,) or (ky, kx) for all slices, or (slices, 1 or ky, kx).
    target
        Reference images (slices, y, x): ``reconstruction_rss``, or ``reconstruction_esc`` for a single coil.
    header
        ISMRMRD header as XML or in short; without one it is made for the shape of k-space and target.
    attributes
        Added to acquisition, patient_id and, with a target, max and norm.
    compress
        Whether to compress k-space (gzip, one chunk a coil).

    Raises
    ------
    InputError
        If the mask does not fit k-space.
    ValueError
        If k-space or target has the wrong number of axes, or k-space is not complex.
    """
    path, shape = Path(path), tuple(kspace.shape)
    first = _array(kspace[0])
    if len(shape) not in (3, 4) or not np.iscomplexobj(first):
        raise ValueError(f"kspace must be complex {LAYOUT}, got {first.dtype} {shape}")
    if target is not None and (target.ndim != 3 or len(target) != shape[0]):
        raise ValueError(f"target must be ({shape[0]}, y, x), got {tuple(target.shape)}")
    full = (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape
    matrix = (int(shape[-2]), int(shape[-1]))
    if header is None:
        recon = matrix if target is None else (int(target.shape[1]), int(target.shape[2]))
        header = Header(matrix, recon, matrix[1] // 2, matrix[1] - 1)
    told: dict[str, Any] = {"acquisition": "unknown", "patient_id": path.stem}
    with atomic(path) as part, h5py.File(part, "w") as file:
        chunks = (*[1] * (len(shape) - 2), *matrix)
        options: dict[str, Any] = {"chunks": chunks, "compression": "gzip"} if compress else {}
        dataset = file.create_dataset("kspace", shape, np.complex64, **options)
        for index in range(shape[0]):
            dataset[index] = _array(kspace[index]).astype(np.complex64)
        if mask is not None:
            normalise_mask(_array(mask), full, path=path)
            file["mask"] = _array(mask).astype(np.uint8)
        if target is not None:
            images = _array(target).astype(np.float32)
            file["reconstruction_rss" if len(shape) == 4 else "reconstruction_esc"] = images
            told |= {"max": float(images.max()), "norm": float(np.linalg.norm(images))}
        file["ismrmrd_header"] = header if isinstance(header, str) else write_header(header)
        for key, value in (told | dict(attributes or {})).items():
            file.attrs[key] = value


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _warn(message: str, *, depth: int = 3) -> None:
    warnings.warn(message, InputWarning, stacklevel=depth)
