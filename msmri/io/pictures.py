"""Find the RGB images of a folder, archive or file, and decode, crop and reduce them one at a time."""

import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from msmri.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["crop", "exact"]

TEST_NUMBERS = 1000  # FFHQ's convention as diffusion papers use it: numbers 0 .. 999 are test images
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")  # Pillow's modes


class Picture(NamedTuple):
    """An image that is there to be decoded."""

    name: str  # path within its folder or archive; of an npz, its `source`
    held_out: bool  # a test image, not to be trained on
    decode: Callable[[], "Image"]  # raises FaultError


class FaultError(Exception):
    """What is wrong with one image."""


def pictures(path: Path) -> Iterable[Picture]:
    """List the images of a folder with its sub-folders, of a zip or npz file, or a single one; none is decoded yet.

    Raises
    ------
    InputError
        If the folder, archive or file is missing, damaged or of another kind.
    """
    if path.is_dir():
        inside = sorted(one.relative_to(path).as_posix() for one in path.rglob("*") if one.is_file())
        return _numbered([(name, partial(_read, path / name)) for name in inside if _is_picture(PurePosixPath(name))])
    if not path.exists():
        raise InputError("does not exist", mend="give a folder, zip or npz of RGB images", path=path)
    if path.suffix.lower() == ".zip":
        return _zip_entries(path)
    if path.suffix.lower() == ".npz":
        return _npz_entries(path)
    return _numbered([(path.name, partial(_read, path))])


def _numbered(named: Sequence[tuple[str, Callable[[], "Image"]]]) -> list[Picture]:
    """Tell test from training images by the last number in each name, or by the order if one has none."""
    found = [re.findall(r"\d+", PurePosixPath(name).stem) for name, _ in named]
    numbers = [int(each[-1]) for each in found] if all(found) else list(range(len(named)))
    return [Picture(name, number < TEST_NUMBERS, load) for (name, load), number in zip(named, numbers, strict=True)]


def _is_picture(name: PurePath) -> bool:
    """Tell images by their names; hidden files, and those that macOS adds to archives, are none."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
    return name.suffix.lower() in SUFFIXES and not hidden


def _zip_entries(path: Path) -> list[Picture]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"is not a readable zip file ({error})", mend="fetch or write it again", path=path) from error
    names = sorted(name for name in archive.namelist() if _is_picture(PurePosixPath(name)))
    return _numbered([(name, partial(_member, archive, name)) for name in names])


def _read(path: Path) -> "Image":
    try:
        return _decoded(path.read_bytes())
    except OSError as error:
        raise FaultError(f"cannot be read ({error.strerror})") from error


def _member(archive: zipfile.ZipFile, name: str) -> "Image":
    try:
        return _decoded(archive.read(name))
    except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise FaultError(f"cannot be taken out of the zip file ({_one_line(error)})") from error


def _npz_entries(path: Path) -> list[Picture]:
    """List the photographs of an npz, whose arrays are read whole."""
    mend = "give images (n, y, x, 3) uint8, and if you like source (n,) and split (n,)"
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ("images", "source", "split") if name in content}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"is not a readable npz file ({_one_line(error)})", mend=mend, path=path) from error
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4):
        what = "no images" if images is None else f"images of {images.dtype} {images.shape}"
        raise InputError(f"holds {what}", mend=mend, path=path)
    for name in ("source", "split"):
        if name in arrays and arrays[name].shape != (len(images),):
            raise InputError(f"holds {len(images)} images but {name} {arrays[name].shape}", mend=mend, path=path)
    sources = arrays.get("source", [f"{path.stem}#{number}" for number in range(len(images))])
    entries = _numbered([(str(name), partial(_from_array, image)) for name, image in zip(sources, images)])
    if "split" not in arrays:
        return entries
    return [entry._replace(held_out=bool(own != 0)) for entry, own in zip(entries, arrays["split"], strict=True)]


def _from_array(image: np.ndarray) -> "Image":
    from PIL import Image

    if image.ndim != 3 or image.shape[-1] not in (3, 4):
        raise FaultError("is grey" if image.ndim == 2 or image.shape[-1] == 1 else f"has {image.shape[-1]} channels")
    return Image.fromarray(image)


def _decoded(content: bytes) -> "Image":
    """Decode an image file, turned as its camera says."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as picture:
                picture.load()
                return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FaultError(f"is damaged or no image ({_one_line(error)})") from error


def square(picture: Picture, size: int | None, fit: Fit) -> np.ndarray:
    """Decode an image, crop it to a square and reduce that by the mean over areas: uint8 (y, x, 3).

    Parameters
    ----------
    picture
        The image.
    size
        Rows and columns; those of the square without it.
    fit
        "crop": the largest square in the middle; "exact": the image must be a square, or of ``size``, already.

    Raises
    ------
    FaultError
        If it is damaged, grey, transparent, smaller than ``size``, or not as ``fit`` demands.
    """
    from PIL import Image

    image = picture.decode()
    if image.mode in GREY:
        raise FaultError("is grey")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise FaultError("is transparent")
    image = image.convert("RGB")
    width, height = image.size
    side = min(width, height)
    if fit == "exact" and not (width == height == (size or side)):
        raise FaultError(f"is {height} x {width}, not {'square' if size is None else f'{size} x {size}'}")
    if size is not None and side < size:
        raise FaultError(f"is {height} x {width}, smaller than {size} x {size}")
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if size is None or side == size:
        values = np.array(image)
    else:  # in floating point: with bytes Pillow rounds twice, and halves always up
        planes = [plane.convert("F").resize((size, size), Image.Resampling.BOX) for plane in image.split()]
        values = np.rint(np.stack([np.asarray(plane) for plane in planes], -1)).astype(np.uint8)
    if bool((values == values[..., :1]).all()):
        raise FaultError("is grey")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
