"""What an HDF5 file must hold to be a scan in the fastMRI layout."""

import difflib
import warnings
from pathlib import Path

import h5py

from msmri.errors import InputError, InputWarning

LAYOUT = "(slices, coil, ky, kx), or (slices, ky, kx) for a single coil"
MEND_COMPLEX = "store it as one complex64 array, kspace = real + 1j * imaginary"


def kspace_shape(file: h5py.File, path: Path) -> tuple[int, int, int, int]:
    """Check name, type and rank of k-space, and give its shape with a coil axis."""
    kspace = file.get("kspace")
    if not isinstance(kspace, h5py.Dataset):
        raise _misnamed(file, path)
    if kspace.dtype.kind != "c":
        kind = "a compound of its parts" if kspace.dtype.kind == "V" else str(kspace.dtype)
        raise InputError(f"kspace is not complex but {kind}", mend=MEND_COMPLEX, path=path)
    shape = kspace.shape
    if len(shape) not in (3, 4):
        raise InputError(f"kspace has {len(shape)} axes {shape}", mend=f"store it as {LAYOUT}", path=path)
    if 0 in shape:
        what = ("slices", "coils", "rows", "columns")[
            ([*shape[:1], 1, *shape[1:]] if len(shape) == 3 else shape).index(0)
        ]
        raise InputError(f"kspace has no {what}, its shape is {shape}", mend="write the file again", path=path)
    return (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape


def _misnamed(file: h5py.File, path: Path) -> InputError:
    """Make the error for a file without ``kspace``, naming the dataset that was probably meant."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    if "dataset/xml" in names:
        return InputError("is an ISMRMRD raw file", mend="convert it to the fastMRI layout first", path=path)
    last = {name.rsplit("/", 1)[-1].lower(): name for name in names}
    near = difflib.get_close_matches("kspace", last, n=1)
    if near:
        return InputError("has no dataset 'kspace'", mend=f"rename {last[near[0]]!r} to 'kspace'", path=path)
    return InputError("has no dataset 'kspace'", mend=f"it holds {', '.join(names[:8]) or 'no datasets'}", path=path)


def find_target(
    file: h5py.File, path: Path, shape: tuple[int, int, int, int]
) -> tuple[str | None, tuple[int, int] | None]:
    """Give name and (y, x) of the reference images, if there are any."""
    names = ["reconstruction_rss", "reconstruction_esc"]
    for name in names if file["kspace"].ndim == 4 else reversed(names):
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            continue
        if dataset.ndim == 3 and len(dataset) == shape[0] and dataset.dtype.kind in "fiu":
            return name, dataset.shape[1:]
        problem = f"{path}: {name} has shape {dataset.shape} for {shape[0]} slices, so it is not a reference"
        warnings.warn(problem, InputWarning, stacklevel=3)  # told of whoever opens the scan
    return None, None
