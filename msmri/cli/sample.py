"""``msmri sample``: draw images from a prior, measured by nobody."""

import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msmri.cli import common
from msmri.cli.common import complain, guarded, progress_bar
from msmri.errors import InputError

if TYPE_CHECKING:
    from msmri.methods.generation import Generation
    from msmri.physics.operators import LinearOperator

UNITS = "scaled: the 99th percentile of the root-sum-of-squares image of the centre lines is 1"


@guarded
def sample(
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write into.")],
    prior: Annotated[Path | None, typer.Option(help="Weights of the prior, for the shipped ones.")] = None,
    count: Annotated[int, typer.Option(help="How many images to draw.")] = 16,
    size: Annotated[str, typer.Option(help="Rows x columns of the images.")] = "128x128",
    coils: Annotated[int, typer.Option(help="Simulated coils to draw the images through.")] = 6,
    maps: Annotated[Path | None, typer.Option(help="Coil maps of msmri coils, in place of simulated ones.")] = None,
    map_slice: Annotated[int, typer.Option(help="Which slice of --maps.")] = 0,
    preset: Annotated[str, typer.Option(help="Settings: default, or paper.")] = "default",
    masks: Annotated[int | None, typer.Option(help="Masks a step (w); 3 without it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Noise levels; 50 without it.")] = None,
    eta: Annotated[float | None, typer.Option(help="Share of fresh noise a step, 0 .. 1; 1 without it.")] = None,
    aggregate: Annotated[str | None, typer.Option(help="Masks of a step: parallel, or sequential.")] = None,
    sigma_max: Annotated[float | None, typer.Option(help="Highest noise level, in units of the prior.")] = None,
    acceleration: Annotated[float, typer.Option("--acceleration", "-R", help="Of the masks: as in training.")] = 4.0,
    law: Annotated[str, typer.Option(help="Law of the masks: as in training.")] = "random-lines",
    seed: Annotated[int, typer.Option(help="Sample k is drawn with seed + k, whatever the batch.")] = 0,
    batch: Annotated[int, typer.Option(help="Samples that go through the network at once.")] = 4,
    device: common.Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: common.DryRun = False,
    debug: common.Debug = False,
) -> None:
    """Draw images from a prior that was trained on undersampled scans, with no measurement at all.

    Writes OUT/samples.h5 (complex, in units of the prior), OUT/samples.png (magnitudes) and OUT/samples.json (how they
    were made). Exit code 0: all done; 2: something to mend; 130: interrupted, --resume goes on.
    """
    import torch

    from msmri.io.output import sha256
    from msmri.methods.generation import Generation
    from msmri.model.prior import load_prior, shipped_prior

    for option, value in (("--count", count), ("--coils", coils), ("--batch", batch)):
        common.at_least(value, 1, option)
    path, place = prior or shipped_prior(), common.find_device(device)
    chosen = common.find_law(law, acceleration, None)
    if chosen is None or isinstance(chosen, torch.Tensor):
        raise InputError("--law wants the name of a law, not a file", path=law)
    given = {"masks_per_step": masks, "steps": steps, "eta": eta, "aggregate": aggregate, "sigma_max": sigma_max}
    given = {name: value for name, value in given.items() if value is not None}
    model: Any = load_prior(path, device=place, in_channels=2)
    method = Generation.preset(preset, prior=model, law=chosen, batch=batch, **given)
    encoding, shape, origin = find_encoding(size, coils, maps, map_slice, seed)
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
        f"{float(ladder[0]):.3g} to {float(ladder[-1]):.3g}, {method.masks_per_step} masks a step of "
        f"{chosen.describe(shape[-2:])}"
    )
    if not dry_run:
        run(out, count, method, encoding, shape, settings, seed, place, resume=resume, overwrite=overwrite)


def find_encoding(
    size: str, coils: int, maps: Path | None, index: int, seed: int
) -> "tuple[LinearOperator, tuple[int, int, int], dict[str, Any]]":
    """Give the coils, the shape (set, y, x) of an image and where the coils came from."""
    import re

    from torch import Generator

    from msmri.io.output import read_maps, sha256
    from msmri.physics.operators import CoilFourier
    from msmri.physics.simulate import coil_maps

    if maps is not None:
        found = read_maps(maps, index=index)[None]
        return CoilFourier(found), (found.shape[1], *found.shape[-2:]), {"maps": sha256(maps), "slice": index}
    sizes = re.fullmatch(r"([1-9]\d*)[x×,]([1-9]\d*)", size)
    if sizes is None or min(int(sizes[1]), int(sizes[2])) < 16:
        raise InputError(f"cannot read --size {size}", mend="give rows x columns such as 128x128, 16 or more")
    matrix = int(sizes[1]), int(sizes[2])
    found = coil_maps(matrix, coils, Generator().manual_seed(seed))
    return CoilFourier(found), (1, *matrix), {"simulated": coils, "seed": seed}


def describe(method: "Generation") -> dict[str, Any]:
    """Give the settings that decide a sample: all but the prior itself and the batch."""
    import dataclasses

    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name not in ("prior", "batch")}
    return {**fields, "law": {"name": method.law.name, **dataclasses.asdict(method.law)}}


def run(
    out: Path,
    count: int,
    method: "Generation",
    encoding: "LinearOperator",
    shape: tuple[int, int, int],
    settings: dict[str, Any],
    seed: int,
    device: str,
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
    from msmri.physics.operators import CoilFourier

    if isinstance(encoding, CoilFourier):
        encoding = dataclasses.replace(encoding, maps=encoding.maps.to(device))
    path, begun, missing = out / "samples.h5", time.time(), []
    told = fingerprint(settings)
    made = {"units": UNITS, "seed": seed, "settings": told}
    if not (resume and path.exists() and finished(path, count, told)):
        writer = SampleWriter(
            path, count, shape[-2:], attributes=made, settings=settings, resume=resume, overwrite=overwrite
        )
        try:
            with writer, progress_bar() as bar:
                missing = [k for k, done in enumerate(writer.done) if not done]
                task = bar.add_task("sampling", total=len(missing) * len(method.ladder()))
                for first in range(0, len(missing), method.batch):
                    group = missing[first : first + method.batch]
                    rng = [torch.Generator().manual_seed(seed + k) for k in group]
                    for step in method.iterate(encoding, shape, rng, device=device):
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
        "command": shlex.join(["msmri", *sys.argv[1:]]),
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
