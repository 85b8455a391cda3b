"""``msmri diagnose``: measure a mask law, a prior and a sampler; each diagnostic leaves a figure and its numbers."""

import re
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
    from collections.abc import Iterable

    from msmri.diagnostics import Diagnostic
    from msmri.diagnostics.subjects import Subject

FEW = 20  # scans up to which each is told by its checksum; of more, the list of names and sizes by its own


@guarded
def diagnose(
    names: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="coverage, score-variance, noisy-reference, choose-w, resolution, adapt, calibration; several by "
            "commas; or all.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write into.")],
    scans: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[SCAN]...", help="Scans (.h5) or directories; the demo scan without any."),
    ] = None,
    prior: Annotated[Path | None, typer.Option(help="Weights of the prior, for the shipped ones.")] = None,
    law: Annotated[str, typer.Option(help="Law of masks, see msmri mask --help.")] = "random-lines",
    acceleration: common.Acceleration = 4.0,
    center_lines: common.CenterLines = None,
    shape: Annotated[str, typer.Option(help="Matrix that coverage looks at the law on.")] = "256x256",
    option: Annotated[
        list[str] | None, typer.Option(help="An option of a diagnostic, such as adapt.steps=100; repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run? Its numbers mean little.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    device: common.Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an earlier run with these settings did.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: common.DryRun = False,
    debug: common.Debug = False,
) -> None:
    """Measure what equations leave open: of a mask law and a data set, of a prior, of a sampler.

    Writes OUT/NAME.png and OUT/NAME.json for every diagnostic, and prints what was learned. Each takes less than five
    minutes with the shipped prior. Exit code 0: all done; 2: something to mend; 130: interrupted, --resume goes on.
    """
    from msmri.diagnostics import DIAGNOSTICS, load_diagnostic
    from msmri.diagnostics.subjects import Subject
    from msmri.io.fastmri import list_scans, open_scan
    from msmri.io.output import check_writable
    from msmri.physics.masks import MaskLaw

    wanted = list(DIAGNOSTICS) if names == "all" else names.split(",")
    diagnostics = [load_diagnostic(name) for name in dict.fromkeys(wanted)]
    given = find_options(option or [], diagnostics)
    settings = {one.name: one.settings(given.get(one.name, {}), quick=quick) for one in diagnostics}
    chosen = common.find_law(law, acceleration, center_lines)
    if not isinstance(chosen, MaskLaw):
        raise InputError("--law wants the name of a law, not a file", path=law)
    sizes = re.fullmatch(r"([1-9]\d*)[x×,]([1-9]\d*)", shape)
    if sizes is None:
        raise InputError(f"cannot read --shape {shape}", mend="give rows x columns such as 256x256")
    if prior is not None and not prior.exists():
        raise InputError("no such file", mend="give the weights of a prior", path=prior)
    files = tuple(list_scans(scans)) if scans else ()
    for path in files:
        with open_scan(path):
            pass  # refuses what is no scan before anything is begun
    matrix = int(sizes[1]), int(sizes[2])
    subject = Subject(files, prior, chosen, matrix, seed, common.find_device(device))
    pending = [one for one in diagnostics if not (resume and finished(out, one, settings[one.name], subject))]
    for one in pending:
        for suffix in (".json", ".png"):
            check_writable(out / f"{one.name}{suffix}", overwrite=overwrite)
    if dry_run:
        for one in pending:
            typer.echo(f"{one.name}: " + ", ".join(f"{key}={value}" for key, value in settings[one.name].items()))
        return
    for one in pending:
        run(one, settings[one.name], subject, out)


def find_options(options: "Iterable[str]", diagnostics: "list[Diagnostic]") -> dict[str, dict[str, Any]]:
    """Read ``NAME.option=value``; the name may be left out where one diagnostic alone runs."""
    from msmri.config import parse_value

    found: dict[str, dict[str, Any]] = {}
    for text in options:
        key, equals, value = text.partition("=")
        name, dot, field = key.strip().rpartition(".")
        if not dot and len(diagnostics) == 1:
            name = diagnostics[0].name
        if not equals or not field or name not in {one.name for one in diagnostics}:
            raise InputError(
                f"cannot use --option {text}", mend="write NAME.option=value, NAME being one of those that run"
            )
        found.setdefault(name, {})[field] = parse_value(value)
    return found


def describe(diagnostic: "Diagnostic", settings: dict[str, Any], subject: "Subject") -> dict[str, Any]:
    """Tell all that decides what a diagnostic finds."""
    import dataclasses
    import hashlib

    from msmri.io.output import sha256

    law = {"name": subject.law.name, **dataclasses.asdict(subject.law)}
    told = {"diagnostic": diagnostic.name, "options": settings, "law": law, "seed": subject.seed}
    if len(subject.files) <= FEW:
        told |= {"scans": {path.name: sha256(path) for path in subject.files}}
    else:
        listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in subject.files)
        told |= {"scans": {f"{len(subject.files)} scans": hashlib.sha256(listing.encode()).hexdigest()}}
    if diagnostic.name == "coverage":
        return told | {"matrix": subject.matrix}
    weights = subject.weights
    return told | {"prior": sha256(weights) if weights is not None else type(subject.prior).__name__}


def finished(out: Path, diagnostic: "Diagnostic", settings: dict[str, Any], subject: "Subject") -> bool:
    """Tell whether an earlier run has written this diagnostic; refuse one of other settings."""
    import json

    from msmri.io.output import fingerprint

    path = out / f"{diagnostic.name}.json"
    if not (path.exists() and path.with_suffix(".png").exists()):
        return False
    try:
        found = json.loads(path.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        found = {}
    if fingerprint(found) != fingerprint(describe(diagnostic, settings, subject)):
        raise InputError("was made with other settings", mend="repeat those, or use --overwrite", path=path)
    return True


def run(diagnostic: "Diagnostic", settings: dict[str, Any], subject: "Subject", out: Path) -> None:
    """Run one diagnostic and write what it found: the figure first, so that numbers mean that all is there."""
    import time

    import torch

    from msmri.io.output import environment, write_manifest

    told = describe(diagnostic, settings, subject)
    begun, cpu = time.perf_counter(), time.process_time()
    steps = diagnostic.function(subject, **settings)
    try:
        with progress_bar() as bar:
            task = bar.add_task(diagnostic.name, total=None)
            while True:
                try:
                    here = next(steps)
                except StopIteration as end:
                    found = end.value
                    break
                bar.update(task, completed=here.done, total=here.total, description=f"{diagnostic.name}: {here.doing}")
    except KeyboardInterrupt:
        complain("interrupted; repeat the command with --resume to keep what is done", kind="msmri")
        raise typer.Exit(common.INTERRUPTED) from None
    finally:
        steps.close()
        with suppress(OSError):
            out.rmdir()  # made for nothing
    out.mkdir(parents=True, exist_ok=True)
    found.draw(out / f"{diagnostic.name}.png")
    manifest = {
        "command": shlex.join(["msmri", *sys.argv[1:]]),
        "settings": told,
        "learned": found.learned,
        "numbers": found.numbers,
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "device": subject.device,
        "environment": environment(),
    }
    write_manifest(out / f"{diagnostic.name}.json", manifest)
    typer.echo(f"{diagnostic.name} ({manifest['seconds']:.0f} s): {out / diagnostic.name}.png, .json")
    for sentence in found.learned:
        typer.echo(f"  {sentence}")
