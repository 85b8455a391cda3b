"""Files opened with clear errors and written whole or not at all: reconstructions, coil maps, manifests."""

import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from msmri import __version__
from msmri.errors import InputError

FINGERPRINT = "msmri_fingerprint"  # attribute of an unfinished reconstruction: the settings it was started with
DONE = "done"  # dataset of an unfinished reconstruction: which slices are in it


def open_hdf5(path: str | Path) -> h5py.File:
    """Open an HDF5 file for reading.

    Raises
    ------
    InputError
        If it is missing, not a regular file, not HDF5, truncated, locked or unreadable.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such file", mend="check the spelling of the path", path=path)
    if path.is_dir():
        raise InputError("is a directory, not a file", mend="name the .h5 file inside it", path=path)
    if not path.is_file():
        raise InputError("is not a regular file", mend="give an HDF5 file", path=path)
    if path.stat().st_size == 0:
        raise InputError("is empty (0 bytes)", mend="copy or download it again", path=path)
    try:
        return h5py.File(path, "r")
    except PermissionError as error:
        raise InputError("may not be read", mend="change its permissions", path=path) from error
    except BlockingIOError as error:
        raise InputError(
            "is being written by another program", mend="wait until that one has finished", path=path
        ) from error
    except OSError as error:
        if h5py.is_hdf5(path):
            raise InputError("is truncated or damaged HDF5", mend="copy or download it again", path=path) from error
        raise InputError("is not an HDF5 file", mend="give a fastMRI-style .h5 file", path=path) from error


def check_writable(path: str | Path, *, overwrite: bool = False) -> None:
    """Check that ``path`` can be written, its missing parent directories included, without leaving anything behind.

    Raises
    ------
    InputError
        If the file exists and ``overwrite`` is False, is a directory, or its directory cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError("is a directory", mend="name a file to write", path=path)
    if path.exists() and not overwrite:
        raise InputError("exists already", mend="choose another name or ask to overwrite it", path=path)
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a directory", mend="choose another place for the output", path=path)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write into {parent} ({error.strerror})", mend="choose another place for the output", path=path
        ) from error


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it on success, remove it on any exception, Ctrl-C included.

    The temporary name ends in ``.part``, so a writer that goes by the suffix must be told the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        os.replace(part, path)  # noqa: PTH105  (os.replace is the documented atomic rename)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class ReconstructionWriter:
    """Write the reconstruction of a scan slice by slice as a fastMRI-style HDF5 file.

    Datasets: ``reconstruction`` (slices, height, width) float32 magnitude in file units, ``reconstruction_complex``
    complex64 and, for several samples, ``reconstruction_std`` float32. While unfinished the file is called
    ``NAME.part``; it is renamed when the ``with`` block ends well, and otherwise removed, unless ``resume`` is set.

    Parameters
    ----------
    path
        The file to write.
    n_slices, shape
        Number of slices, and (height, width) of each.
    samples
        Number of samples a slice; ``reconstruction_std`` is written when it is above 1.
    source
        Scan whose attributes and ``ismrmrd_header`` are copied.
    attributes
        Further attributes of the file, such as the acceleration.
    settings
        Everything that decides the result (method, seed, checksums...); a resumed file must have been started with
        the same ones.
    resume
        Keep the unfinished file on failure, and continue one that is there.
    overwrite
        Replace an existing ``path``.
    """

    def __init__(
        self,
        path: str | Path,
        n_slices: int,
        shape: tuple[int, ...],
        *,
        samples: int = 1,
        source: str | Path | None = None,
        attributes: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path, self.shape = Path(path), (n_slices, *shape)
        self.part = self.path.with_name(self.path.name + ".part")
        self.source, self.attributes = source, dict(attributes or {})
        self.resume, self.overwrite = resume, overwrite
        self._types = {"reconstruction": np.float32, "reconstruction_complex": np.complex64}
        if samples > 1:
            self._types["reconstruction_std"] = np.float32
        self._fingerprint = fingerprint({**(settings or {}), "output shape": self.shape, "samples": samples})
        self._file: h5py.File | None = None

    def __enter__(self) -> "ReconstructionWriter":
        """Create the unfinished file, or open the one to continue.

        Raises
        ------
        InputError
            If the output exists or cannot be written, or the unfinished file belongs to other settings.
        """
        check_writable(self.path, overwrite=self.overwrite)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.resume and self.part.exists():
            self._reopen()
        else:
            self._create()
        return self

    def _create(self) -> None:
        if self.part.exists():  # HDF5 truncates before it looks at the lock: never open another run's file for that
            try:
                h5py.File(self.part, "r+").close()
            except BlockingIOError as error:
                raise InputError("another run is writing this output", mend="wait for it", path=self.part) from error
            except OSError:
                pass  # damaged, so nobody is writing it
            self.part.unlink()
        self._file = h5py.File(self.part, "w-")
        try:
            for name, dtype in self._types.items():
                self._file.create_dataset(name, self.shape, dtype)
            self._file.create_dataset(DONE, data=np.zeros(self.shape[0], dtype=bool))
            if self.source is not None:
                with open_hdf5(self.source) as scan:
                    for key, value in scan.attrs.items():
                        self._file.attrs[key] = value
                    if "ismrmrd_header" in scan:
                        scan.copy("ismrmrd_header", self._file)
            for key, value in self.attributes.items():
                self._file.attrs[key] = value
            self._file.attrs[FINGERPRINT] = self._fingerprint
            self._file.flush()
        except BaseException:
            self._discard()
            raise

    def _reopen(self) -> None:
        try:
            file = h5py.File(self.part, "r+")
        except OSError as error:
            raise InputError(
                "the unfinished output is damaged or in use", mend="delete it to start again", path=self.part
            ) from error
        found = file.attrs.get(FINGERPRINT, "{}")
        if found != self._fingerprint or DONE not in file:
            file.close()
            before, now = json.loads(found), json.loads(self._fingerprint)
            differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
            raise InputError(
                f"the unfinished output was started with other settings ({', '.join(differing) or 'not by msmri'})",
                mend="repeat those settings, or delete it to start again",
                path=self.part,
            )
        self._file = file

    @property
    def done(self) -> np.ndarray:
        """Bool (slices,): which slices have been written, now or by the run that is resumed."""
        return self._open[DONE][()]

    @property
    def _open(self) -> h5py.File:
        if self._file is None:
            raise ValueError(f"{self.path}: write inside a with block")
        return self._file

    def write(self, index: int, image: Tensor, *, std: Tensor | None = None) -> None:
        """Write slice ``index``: complex ``image`` (y, x) and ``std`` (y, x) of its magnitude, in file units.

        The slice counts as done only once its data are on the way to the disk, so a killed run can be resumed.
        """
        file = self._open
        values = {"reconstruction": image.abs(), "reconstruction_complex": image}
        if std is not None:
            values["reconstruction_std"] = std
        if values.keys() != self._types.keys():
            raise ValueError(f"{self.path}: give std if, and only if, there are several samples")
        if any(value.shape != self.shape[1:] for value in values.values()):
            raise ValueError(f"{self.path}: slices are {self.shape[1:]}, got {tuple(image.shape)}")
        for name, value in values.items():
            file[name][index] = value.detach().cpu().numpy().astype(self._types[name])
        file.flush()
        file[DONE][index] = True
        file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rename the finished file into place; close or remove an unfinished one.

        Raises
        ------
        ValueError
            If the block ended well but some slices were never written.
        """
        try:
            if kind is None:
                missing = np.flatnonzero(~self.done)
                if len(missing):
                    raise ValueError(f"{self.path}: slices {missing.tolist()} were not written")
                del self._open[DONE], self._open.attrs[FINGERPRINT]
                self._open.close()
                os.replace(self.part, self.path)  # noqa: PTH105
        finally:
            self._discard(keep=self.resume)

    def _discard(self, *, keep: bool = False) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if not keep:
            self.part.unlink(missing_ok=True)


def read_reconstruction(path: str | Path, name: str = "reconstruction") -> Tensor:
    """Read one dataset (slices, y, x) of a reconstruction, or a reference such as ``reconstruction_rss``.

    Raises
    ------
    InputError
        If the file cannot be read or has no such dataset of three axes.
    """
    return torch.from_numpy(_read(path, name, axes=3))


def write_maps(path: str | Path, maps: Iterable[Tensor], *, attributes: Mapping[str, Any] | None = None) -> None:
    """Write coil maps as dataset ``maps`` complex64 (slices, set, coil, y, x); an existing file is replaced.

    ``maps`` is a tensor, or yields one slice (set, coil, y, x) after the other, so that memory stays small.
    ``attributes`` are what the maps depend on, for :func:`read_maps` to check.
    """
    with atomic(path) as part, h5py.File(part, "w") as file:
        for index, one in enumerate(maps):
            values = one.detach().cpu().numpy().astype(np.complex64)
            if index == 0:
                file.create_dataset(
                    "maps", (0, *values.shape), np.complex64, maxshape=(None, *values.shape), chunks=(1, *values.shape)
                )
            file["maps"].resize(index + 1, axis=0)
            file["maps"][index] = values
        if "maps" not in file:
            raise ValueError(f"{path}: no maps to write")
        file.attrs[FINGERPRINT] = fingerprint(attributes or {})


def read_maps(path: str | Path, *, index: int | None = None, attributes: Mapping[str, Any] | None = None) -> Tensor:
    """Read coil maps (slices, set, coil, y, x), or the (set, coil, y, x) of one slice.

    Raises
    ------
    InputError
        If the file cannot be read, or was not written with these ``attributes`` (not checked when None).
    """
    values = _read(path, "maps", axes=5, index=index)
    if attributes is not None:
        with open_hdf5(path) as file:
            if file.attrs.get(FINGERPRINT) != fingerprint(attributes):
                raise InputError(
                    "these coil maps were made from another scan or with other settings",
                    mend="delete the file to estimate them anew",
                    path=path,
                )
    return torch.from_numpy(values)


def _read(path: str | Path, name: str, *, axes: int, index: int | None = None) -> np.ndarray:
    with open_hdf5(path) as file:
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim != axes:
            raise InputError(
                f"has no dataset {name!r} of {axes} axes", mend=f"it holds {', '.join(file) or 'nothing'}", path=path
            )
        if index is not None and not 0 <= index < len(dataset):
            raise InputError(f"has no slice {index}", mend=f"it holds {len(dataset)}", path=path)
        try:
            return np.asarray(dataset[() if index is None else index])
        except OSError as error:
            raise InputError(f"{name!r} is damaged", mend="write the file again", path=path) from error


def write_manifest(path: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest as indented JSON; paths become text, tensors and arrays lists, NaN and infinity null."""
    with atomic(path) as part:
        part.write_text(json.dumps(_plain(manifest), indent=2, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Give settings as canonical JSON text: equal for equal settings, whatever their order."""
    return json.dumps(_plain(settings), sort_keys=True, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def sha256(path: str | Path) -> str:
    """Give the SHA-256 checksum of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def environment() -> dict[str, Any]:
    """Tell versions and platform: what a manifest needs for a result to be repeated."""
    return {
        "msmri": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _commit() -> str | None:
    """Give the commit of the checkout msmri runs from, with ``-dirty`` behind it if files differ; else None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, maybe inside the repository of another project
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
