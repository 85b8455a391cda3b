"""``msmri distance``: how far a set of drawn images is from a set of references."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msmri.cli import common
from msmri.cli.common import complain, guarded, progress_bar
from msmri.cli.recipe import provenance
from msmri.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES_FILE = "samples.h5"  # of a folder that msmri sample wrote
FEWEST, USUAL = 3, 2048  # images a side: for any distance; for an FID, whose features are so many
SUBSET, GROUP = 100, 16  # images in each of KID's subsets; images described at once
FLOOR = "floor: what two sets of these sizes from one law give on average; a value near it tells no difference"
BIASED = "FID has an upward bias, the larger the fewer images: compare values of equal numbers of images alone"


@dataclass(frozen=True)
class Images:
    """One side of a distance."""

    values: "Tensor"  # magnitudes (n, y, x), or colours (n, 3, y, x) within 0 .. 1
    files: list[dict[str, Any]]  # path, SHA-256 and, where a file is read by itself, number of images

    def describe(self) -> dict[str, Any]:
        """Give what a manifest says of it."""
        kind = "magnitudes" if self.values.ndim == 3 else "colours"
        return {"images": len(self.values), "kind": kind, "size": self.values.shape[-2:], "files": self.files}


@guarded
def distance(
    drawn: Annotated[
        Path,
        typer.Argument(
            metavar="DRAWN", help="samples.h5 of msmri sample, its folder, or photographs (folder, zip, npz)."
        ),
    ],
    references: Annotated[
        list[Path],
        typer.Argument(
            metavar="REFERENCE...",
            help="Fully sampled scans, results of msmri recon, other samples, folders of such; or photographs.",
        ),
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write scores and checksums as JSON.")] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Weights of Inception, for FID and KID besides; see the documentation.")
    ] = None,
    slices: common.Slices = None,
    split: Annotated[str, typer.Option(help="Of photographs as references: all, train, or test.")] = "all",
    seed: Annotated[int, typer.Option(help="Of the floor and of KID's subsets.")] = 0,
    device: common.Device = "auto",
    overwrite: common.Overwrite = False,
    debug: common.Debug = False,
) -> None:
    """Tell how far drawn images are from references, both taken as samples of a distribution.

    By default the Frechet distance on scattering features, which needs no download, with its floor; with --inception
    also FID and KID. References are brought to the size of the drawn images. Exit code 0: done; 2: something to mend.
    """
    import time

    from msmri.io.output import check_writable, environment, sha256, write_manifest

    begun, place = time.time(), common.find_device(device)
    if out is not None:
        check_writable(out, overwrite=overwrite)
    network = None if inception is None else load_inception(inception)
    ours = read_drawn(drawn)
    if slices is not None and ours.values.ndim == 4:
        raise InputError("--slices is for scans", mend="choose photographs by --split")
    theirs = read_references(references, ours, slices, split)
    rows, columns = ours.values.shape[-2:]
    typer.echo(f"{len(ours.values)} drawn images of {rows} x {columns} against {len(theirs.values)} references\n")
    scores = score(ours, theirs, network, place, seed)
    if inception is not None:
        scores["inception"]["sha256"] = sha256(inception)
    show(scores, (len(ours.values), len(theirs.values)))
    if out is not None:
        record = {
            **provenance(None),
            "drawn": ours.describe(),
            "references": theirs.describe(),
            "settings": {"slices": slices, "split": split, "seed": seed},
            "scores": scores,
            "seconds": time.time() - begun,
            "device": place,
            "environment": environment(),
        }
        write_manifest(out, record)


def load_inception(path: Path) -> "nn.Module":
    """Load Inception before any work, so that what is missing is told at once."""
    from msmri.distances import INCEPTION_FILE, INCEPTION_SITE, _inception

    try:
        return _inception(path)
    except InputError:
        raise
    except Exception as error:
        mend = f"get {INCEPTION_FILE} from {INCEPTION_SITE}"
        raise InputError("cannot be read as the weights of Inception", mend=mend, path=path) from error


def score(ours: Images, theirs: Images, network: "nn.Module | None", device: str, seed: int) -> dict[str, Any]:
    """Compute the Frechet distance on scattering features, and with a network FID and KID."""
    import torch

    from msmri.distances import frechet_distance, inception_distances, scattering_features

    features = []
    with progress_bar() as bar:
        task = bar.add_task("features", total=len(theirs.values) + len(ours.values))
        for side in (theirs, ours):
            found = []
            for group in side.values.split(GROUP):
                found.append(scattering_features(group))
                bar.update(task, advance=len(group))
            features.append(torch.cat(found))
    told = frechet_distance(*features, rng=torch.Generator().manual_seed(seed))
    scores: dict[str, Any] = {
        "scattering": {
            "distance": told.value,
            "floor": told.floor,
            "excess": told.excess,
            "means": told.means,
            "shrinkage": {"references": told.shrinkage[0], "drawn": told.shrinkage[1]},
        }
    }
    if network is not None:
        subset = min(SUBSET, len(ours.values), len(theirs.values))
        options: dict[str, Any] = {"network": network, "subset": subset, "device": device, "seed": seed}
        scores["inception"] = {**inception_distances(theirs.values, ours.values, **options), "subset": subset}
    return scores


def show(scores: dict[str, Any], counts: tuple[int, int]) -> None:
    """Print the scores as a table."""
    from msmri.report import markdown_table

    sizes = {"drawn": counts[0], "references": counts[1]}
    plain = scores["scattering"]
    lines = [{"distance": "Frechet, scattering", "value": plain["distance"], "floor": plain["floor"], **sizes}]
    formats = {"distance": "", "value": ".4g", "floor": ".4g", "drawn": "", "references": ""}
    if "inception" in scores:
        found = scores["inception"]
        lines.append({"distance": "FID, Inception", "value": found["fid"], **sizes})
        lines.append({"distance": "KID, Inception", "value": found["kid"], "± std": found["kid_std"], **sizes})
        formats = {"distance": "", "value": ".4g", "± std": ".2g", "floor": ".4g", "drawn": "", "references": ""}
    typer.echo(f"{markdown_table(lines, formats)}{FLOOR}")
    if "inception" in scores and min(counts) < USUAL:
        complain(f"{BIASED}; 3,000 are usual", kind="warning")


def read_drawn(path: Path) -> Images:
    """Read what is judged: samples of ``msmri sample``, or photographs as they are.

    Raises
    ------
    InputError
        If it cannot be read, is unfinished, or holds too few or too small images.
    """
    from msmri.distances import SMALLEST

    found = samples_file(path)
    if found is not None:
        values = read_samples_file(found)
        images = Images(values, [{"path": found, "images": len(values), "sha256": checksum(found)}])
    else:
        images = read_photographs([path], None, "all")
    if min(images.values.shape[-2:]) < SMALLEST:
        rows, columns = images.values.shape[-2:]
        mend = f"draw images of {SMALLEST} pixels or more along either side"
        raise InputError(f"holds images of {rows} x {columns}, too small to tell a distance", mend=mend, path=path)
    return enough(images, path)


def read_references(paths: list[Path], ours: Images, slices: str | None, split: str) -> Images:
    """Read what drawn images are compared with, brought to their size.

    Raises
    ------
    InputError
        If something cannot be read, is of another kind than the drawn images, or not fully sampled.
    """
    import torch

    from msmri.io.fastmri import list_scans

    rows, columns = ours.values.shape[-2:]
    pictures = [path for path in paths if not is_hdf5(path)]
    colours = ours.values.ndim == 4
    if colours and len(pictures) == len(paths):
        if rows != columns:
            mend = "draw squares: photographs are cropped to such"
            raise InputError(f"drawn images are {rows} x {columns}, not square", mend=mend)
        return enough(read_photographs(paths, rows, split), paths[0])
    if pictures and colours:
        raise InputError(
            "photographs and samples cannot be references together", mend="give one kind", path=pictures[0]
        )
    if not colours and split != "all":
        raise InputError("--split is for photographs", mend="choose slices by --slices")
    files = list_scans(paths)
    values, told, framed = [], [], 0
    with progress_bar() as bar:
        task = bar.add_task("references", total=len(files))
        for path in files:
            found = list(read_file(path, slices))
            if (found[0].ndim == 4) != colours:
                kinds = ("colours", "magnitudes") if colours else ("magnitudes", "colours")
                raise InputError(f"holds {kinds[1]}, drawn are {kinds[0]}", mend="give references alike", path=path)
            if colours and found[0].shape[-2:] != (rows, columns):
                size = " x ".join(map(str, found[0].shape[-2:]))
                raise InputError(f"holds images of {size}, drawn are {rows} x {columns}", path=path)
            framed += 0 if colours else sum(len(x) for x in found if x.shape[-2] < rows and x.shape[-1] < columns)
            mine = torch.cat(found if colours else [fit(images, (rows, columns)) for images in found])
            values.append(require_images(mine, path))
            told.append({"path": path, "images": len(mine), "sha256": checksum(path)})
            bar.update(task, advance=1)
    if framed:
        complain(f"{framed} references are smaller than the drawn images: zeros are put around them", kind="warning")
    return enough(Images(torch.cat(values), told), paths[0])


def enough(images: Images, path: Path) -> Images:
    """Refuse too few images."""
    if len(images.values) < FEWEST:
        problem = f"gives {len(images.values)} images, too few to tell a distance"
        raise InputError(problem, mend=f"give {FEWEST}, better some hundred", path=path)
    return images


def require_images(values: "Tensor", path: Path) -> "Tensor":
    """Refuse images that are not finite or black."""
    import torch

    good = values.flatten(1).isfinite().all(1) & (values.flatten(1).amax(1) > 0)
    if not bool(good.all()):
        number = int(torch.argmin(good.int()))
        problem = f"image {number} of those chosen holds NaN or infinite values, or nothing at all"
        raise InputError(problem, mend="leave it out, of scans by --slices", path=path)
    return values


def read_file(path: Path, slices: str | None) -> "Iterator[Tensor]":
    """Read complex or magnitude images (n, y, x) of a fully sampled scan or a result, or samples as they are drawn."""
    from msmri.io.output import open_hdf5, read_reconstruction
    from msmri.io.samples import SAMPLES

    with open_hdf5(path) as file:
        names = set(file)
    if SAMPLES in names:
        values = read_samples_file(path)
        yield values[chosen(slices, len(values), path)]
    elif "reconstruction" in names:
        values = read_reconstruction(path, "reconstruction")
        if "reconstruction_complex" in names:  # of which the former is the magnitude
            values = read_reconstruction(path, "reconstruction_complex")
        yield values[chosen(slices, len(values), path)]
    elif "kspace" in names:
        yield from combined(path, slices)
    else:
        mend = f"it holds {', '.join(sorted(names)[:8]) or 'nothing'}"
        raise InputError("holds no k-space, reconstruction or samples", mend=mend, path=path)


def combined(path: Path, slices: str | None) -> "Iterator[Tensor]":
    """Combine the coils of a fully sampled scan, slice by slice: complex (1, y, x)."""
    from msmri.io.fastmri import open_scan
    from msmri.methods import combine_sets
    from msmri.physics.espirit import Espirit
    from msmri.physics.operators import CoilFourier

    with open_scan(path) as scan:
        if scan.is_undersampled:
            mend = "give fully sampled scans, or results of msmri recon"
            raise InputError("is undersampled, so it is no reference", mend=mend, path=path)
        for index in chosen(slices, scan.n_slices, path):
            one = scan.read(index)
            maps = Espirit(crop=0.0)(one.values, one.mask)  # the background stays, as in samples
            yield combine_sets(CoilFourier(maps).adjoint(one.values))


def chosen(slices: str | None, count: int, path: Path) -> list[int]:
    """Give the numbers of the slices that --slices means."""
    wanted = common.find_slices(slices)
    found = wanted if isinstance(wanted, list) else list(range(count)[wanted or slice(None)])
    if not found or max(found) >= count:
        raise InputError(f"has no slices {slices}", mend=f"it holds {count}", path=path)
    return found


def fit(images: "Tensor", shape: tuple[int, int]) -> "Tensor":
    """Bring slices (n, y, x) to the matrix of drawn images; magnitudes.

    Zeros around them make the field of view as oblong as ``shape`` (a square, for one), and the centre of k-space is
    kept. None is enlarged: what is smaller gets zeros around it.
    """
    import torch

    from msmri.physics.simulate import crop_kspace

    if images.shape[-2:] == shape:
        return images.abs().float()
    grow = max(1.0, *(n / wanted for n, wanted in zip(images.shape[-2:], shape, strict=True)))
    top, left = (round(wanted * grow) - n for n, wanted in zip(images.shape[-2:], shape, strict=True))
    around = (left // 2, left - left // 2, top // 2, top - top // 2)
    return crop_kspace(torch.nn.functional.pad(images.to(torch.complex64), around), shape).abs()


def is_hdf5(path: Path) -> bool:
    """Tell whether a path is meant as HDF5, or a folder of such; else it is of photographs."""
    return any(path.glob("*.h5")) if path.is_dir() else path.suffix.lower() not in (".zip", ".npz", *suffixes())


def suffixes() -> tuple[str, ...]:
    """Give the suffixes of single photographs."""
    from msmri.io.pictures import SUFFIXES

    return SUFFIXES


def samples_file(path: Path) -> Path | None:
    """Find the file of samples that a path means, None if it is of photographs."""
    if not path.is_dir():
        return path if is_hdf5(path) else None
    if (path / f"{SAMPLES_FILE}.part").exists() and not (path / SAMPLES_FILE).exists():
        raise InputError("the drawing is unfinished", mend="repeat msmri sample with --resume", path=path)
    return path / SAMPLES_FILE if (path / SAMPLES_FILE).exists() else None


def read_samples_file(path: Path) -> "Tensor":
    """Read samples as magnitudes (n, y, x), or colours (n, 3, y, x) within 0 .. 1."""
    from msmri.io.output import DONE, open_hdf5
    from msmri.io.samples import read_samples

    with open_hdf5(path) as file:
        if DONE in file:
            raise InputError("is unfinished", mend="repeat msmri sample with --resume", path=path)
    try:
        values = read_samples(path)
    except (OSError, TypeError, AttributeError) as error:
        raise InputError("has damaged samples", mend="draw them again", path=path) from error
    if values.ndim == 4 and values.shape[1] == 3 and not values.is_complex():
        values = ((values.float() + 1) / 2).clamp(0, 1)
    elif values.ndim == 3:
        values = values.abs().float()
    else:
        mend = "give a samples.h5 of msmri sample"
        raise InputError(f"holds samples of shape {tuple(values.shape)}", mend=mend, path=path)
    return require_images(values, path)


def read_photographs(paths: list[Path], size: int | None, split: str) -> Images:
    """Read photographs within 0 .. 1."""
    from msmri.io.photos import read_photos

    photos = read_photos(paths, size=size, split=split)  # type: ignore[arg-type]
    values = require_images(photos.pixels.float() / 255, paths[0])
    return Images(values, [{"path": path, "sha256": checksum(path)} for path in paths])


def checksum(path: Path) -> str:
    """Give the SHA-256 of a file; of a folder, that of the names and checksums of all files in it, sorted."""
    import hashlib

    from msmri.io.output import sha256

    if not path.is_dir():
        return sha256(path)
    inside = sorted((one.relative_to(path).as_posix(), one) for one in path.rglob("*") if one.is_file())
    return hashlib.sha256("".join(f"{name} {sha256(one)}\n" for name, one in inside).encode()).hexdigest()
