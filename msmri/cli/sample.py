"""``msmri sample``: draw images from a prior, measured by nobody."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msmri.cli import common
from msmri.cli.common import complain, guarded, progress_bar
from msmri.cli.recipe import Recipe, provenance
from msmri.errors import InputError

if TYPE_CHECKING:
    from msmri.methods.generation import Generation
    from msmri.physics.operators import LinearOperator

SHIPPED_SIZE = "64x64"  # what the shipped prior was trained on
COLOURS = "colours within -1..1"
UNITS = "scaled: the 99th percentile of the root-sum-of-squares image of the centre lines is 1"


@guarded
def sample(
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write into.")],
    recipe: Recipe = None,
    prior: Annotated[
        Path | None, typer.Option(help="Weights of the prior; the shipped one of 64 x 64 brains without it.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many images to draw.")] = 16,
    size: Annotated[
        str | None,
        typer.Option(
            help="Rows x columns; 128x128 without it, or what the shipped prior or photographs were trained on."
        ),
    ] = None,
    coils: Annotated[int, typer.Option(help="Simulated coils to draw the images through.")] = 6,
    maps: Annotated[Path | None, typer.Option(help="Coil maps of msmri coils, in place of simulated ones.")] = None,
    map_slice: Annotated[int, typer.Option(help="Which slice of --maps.")] = 0,
    preset: Annotated[str, typer.Option(help="Settings: default, or paper.")] = "default",
    masks: Annotated[int | None, typer.Option(help="Masks a step (w); 3 without it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Noise levels; 50 without it.")] = None,
    eta: Annotated[float | None, typer.Option(help="Share of fresh noise a step, 0 .. 1; 1 without it.")] = None,
    covering: Annotated[
        bool | None, typer.Option("--covering/--independent", help="Deal the masks of a step, or draw each by itself.")
    ] = None,
    aggregate: Annotated[str | None, typer.Option(help="Masks of a step: parallel, or sequential.")] = None,
    extrapolate: Annotated[
        float | None,
        typer.Option(help="Carry estimates beyond those of their masks' halves; three times the passes. 0 without it."),
    ] = None,
    sigma_max: Annotated[float | None, typer.Option(help="Highest noise level, in units of the prior.")] = None,
    acceleration: Annotated[
        float | None,
        typer.Option("--acceleration", "-R", help="Of the masks: that of training where weights tell it, else 4."),
    ] = None,
    law: Annotated[
        str | None, typer.Option(help="Law of the masks; that of training where weights tell it, else random-lines.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Sample k is drawn with seed + k, whatever the batch.")] = 0,
    batch: Annotated[int, typer.Option(help="Samples that go through the network at once.")] = 4,
    device: common.Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: common.DryRun = False,
    debug: common.Debug = False,
) -> None:
    """Draw images from a prior that was trained on undersampled scans or incomplete photographs, measured by nobody.

    Writes OUT/samples.h5 (in units of the prior), OUT/samples.png (magnitudes, or colours) and OUT/samples.json (how
    they were made). Exit code 0: all done; 2: something to mend; 130: interrupted, --resume goes on.
    """
    import torch

    from msmri.io.output import sha256
    from msmri.methods.generation import Generation
    from msmri.model.checkpoint import read_header
    from msmri.model.prior import load_prior, shipped_prior
    from msmri.physics.operators import Identity
    from msmri.physics.tiles import RandomTiles

    for option, value in (("--count", count), ("--coils", coils), ("--batch", batch)):
        common.at_least(value, 1, option)
    path, place = prior or shipped_prior(draws=True), common.find_device(device)
    size = size or (SHIPPED_SIZE if prior is None else None)
    trained = (read_header(path).get("recipe") or {}) if path.suffix == ".safetensors" else {}
    pixels = (trained.get("data") or {}).get("size")  # of photographs; scans have none
    model: Any = load_prior(path, device=place)
    published = published_size(model, path)
    if published is not None:
        pixels, model.law = published, RandomTiles()
    told: Any = None if law is not None else getattr(model, "law", None)
    if acceleration is not None and "acceleration" in getattr(told, "__dataclass_fields__", ()):
        told = replace(told, acceleration=acceleration)
    chosen = told or common.find_law(law or "random-lines", acceleration or 4.0, None)
    if chosen is None or isinstance(chosen, torch.Tensor):
        raise InputError("--law wants the name of a law, not a file", path=law)
    if sigma_max is None and (pixels is not None or preset == "default"):
        sigma_max = getattr(model, "highest", None)
    given = {"masks_per_step": masks, "steps": steps, "eta": eta, "covering": covering, "aggregate": aggregate}
    given |= {"extrapolate": extrapolate, "sigma_max": sigma_max}
    given = {name: value for name, value in given.items() if value is not None}
    method = Generation.preset(preset, prior=model, law=chosen, batch=batch, **given)
    if pixels is None:
        encoding, shape, origin = find_encoding(size or "128x128", coils, maps, map_slice, seed)
    else:
        draws = callable(model) and not hasattr(model, "denoise") and not hasattr(model, "further")
        if published is None and not draws:
            raise InputError("these weights do not draw by MSM", mend="give those of an MSM recipe", path=path)
        encoding, shape, origin = Identity(), (3, *find_matrix(size or f"{pixels}x{pixels}")), {}
    settings = {
        "prior": sha256(path),
        "method": {**describe(method), "preset": preset},
        "seed": seed,
        "shape": shape,
        "coils": origin,
    }
    ladder = method.ladder()
    typer.echo(
        f"{count} images of {shape[-2]} x {shape[-1]} from {path.name}: {len(ladder)} steps from sigma "
        f"{float(ladder[0]):.3g} to {float(ladder[-1]):.3g}, {method.passes(chosen, shape[-2:])} masks a step of "
        f"{chosen.describe(shape[-2:])}"
    )
    if not dry_run:
        more = {"resume": resume, "overwrite": overwrite}
        run(out, count, method, encoding, shape, settings, seed, place, provenance(recipe), **more)


def published_size(model: Any, path: Path) -> int | None:
    """Give the pixels along each side of what published weights for photographs draw, None for any other prior."""
    from msmri.model.adm import ADMUNet
    from msmri.model.denoiser import EpsilonVP

    if not isinstance(model, EpsilonVP) or not isinstance(model.network, ADMUNet):
        return None
    if model.network.config.in_channels != 3:
        problem = f"the weights are for {model.network.config.in_channels} real channels, not 2 or 3"
        raise InputError(problem, mend="give those of scans or of photographs", path=path)
    return model.network.config.image_size


def find_encoding(
    size: str, coils: int, maps: Path | None, index: int, seed: int
) -> "tuple[LinearOperator, tuple[int, int, int], dict[str, Any]]":
    """Give the coils, the shape (set, y, x) of an image and where the coils came from."""
    from torch import Generator

    from msmri.io.output import read_maps, sha256
    from msmri.physics.operators import CoilFourier
    from msmri.physics.simulate import coil_maps

    if maps is not None:
        found = read_maps(maps, index=index)[None]
        return CoilFourier(found), (found.shape[1], *found.shape[-2:]), {"maps": sha256(maps), "slice": index}
    matrix = find_matrix(size)
    found = coil_maps(matrix, coils, Generator().manual_seed(seed))
    return CoilFourier(found), (1, *matrix), {"simulated": coils, "seed": seed}


def find_matrix(size: str) -> tuple[int, int]:
    """Read rows x columns."""
    import re

    sizes = re.fullmatch(r"([1-9]\d*)[x×,]([1-9]\d*)", size)
    if sizes is None or min(int(sizes[1]), int(sizes[2])) < 16:
        raise InputError(f"cannot read --size {size}", mend="give rows x columns such as 128x128, 16 or more")
    return int(sizes[1]), int(sizes[2])


def describe(method: "Generation") -> dict[str, Any]:
    """Give the settings that decide a sample: all but the prior itself and the batch."""
    import dataclasses

    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name not in ("prior", "batch")}
    law: Any = method.law_of()
    return {**fields, "law": {"name": law.name, **dataclasses.asdict(law)}}


def run(
    out: Path,
    count: int,
    method: "Generation",
    encoding: "LinearOperator",
    shape: tuple[int, int, int],
    settings: dict[str, Any],
    seed: int,
    device: str,
    made_by: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Draw what is missing, group by group, and write the sheet and the manifest when all are there."""
    import dataclasses
    import time

    import torch

    from msmri.io.output import environment, fingerprint, write_manifest
    from msmri.io.samples import SampleWriter, image_sheet, read_samples
    from msmri.methods import combine_sets
    from msmri.physics.operators import CoilFourier, Identity

    if isinstance(encoding, CoilFourier):
        encoding = dataclasses.replace(encoding, maps=encoding.maps.to(device))
    path, begun, missing = out / "samples.h5", time.time(), []
    told = fingerprint(settings)
    colours = isinstance(encoding, Identity)
    matrix = shape if colours else shape[-2:]
    kind = torch.float32 if colours else torch.complex64
    made = {"units": COLOURS if colours else UNITS, "seed": seed, "settings": told}
    if not (resume and path.exists() and finished(path, count, told)):
        writer = SampleWriter(
            path, count, matrix, kind, attributes=made, settings=settings, resume=resume, overwrite=overwrite
        )
        try:
            with writer, progress_bar() as bar:
                missing = [k for k, done in enumerate(writer.done) if not done]
                task = bar.add_task("sampling", total=len(missing) * len(method.ladder()))
                for first in range(0, len(missing), method.batch):
                    group = missing[first : first + method.batch]
                    rng = [torch.Generator().manual_seed(seed + k) for k in group]
                    for step in method.iterate(encoding, shape, rng, dtype=kind, device=device):
                        bar.update(task, advance=len(group), description=f"{first}/{len(missing)} images")
                        last = step.estimate
                    images = combine_sets(encoding.adjoint(last))
                    for k, image in zip(group, images, strict=True):
                        writer.write(k, image)
        except KeyboardInterrupt:
            complain("interrupted; repeat the command with --resume to go on where it stopped", kind="msmri")
            raise typer.Exit(common.INTERRUPTED) from None
        finally:
            with suppress(OSError):
                out.rmdir()  # made for nothing
    image_sheet(out / "samples.png", read_samples(path))
    manifest = {
        **made_by,
        "count": count,
        "settings": settings,
        "ladder": method.ladder(),
        "drawn by this run": len(missing),
        "seconds": time.time() - begun,
        "device": device,
        "environment": environment(),
    }
    write_manifest(out / "samples.json", manifest)
    typer.echo(f"{count} images are in {out}: samples.h5, samples.png, samples.json")


def finished(path: Path, count: int, settings: str) -> bool:
    """Tell whether a file holds all images of these settings; refuse one of others."""
    from msmri.io.output import open_hdf5
    from msmri.io.samples import read_samples

    with open_hdf5(path) as file:
        same = file.attrs.get("settings") == settings
    if not same or len(read_samples(path)) != count:
        raise InputError("was made with other settings", mend="repeat those, or use --overwrite", path=path)
    return True
