"""``msmri restore``: degrade photographs and restore them, or restore what is degraded already."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msmri.cli import common
from msmri.cli.common import complain, guarded, one_line, progress_bar
from msmri.cli.recipe import MethodOptions, Recipe, provenance
from msmri.config import parse_value
from msmri.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from msmri.io.photos import Photos
    from msmri.io.tasks import Task
    from msmri.measurement import Measurement
    from msmri.methods import Reconstructor
    from msmri.tensors import Mask

WEIGHTS = {"msm": "faces_msm.safetensors"}  # in msmri/weights, or in the folder of --weights
WEIGHTS |= dict.fromkeys(("a-dps", "a-ald", "a-os"), "faces_ambient.safetensors")
WEIGHTS |= dict.fromkeys(("dps", "ddnm", "diffpir"), "faces_oracle.safetensors")
PRESET = "restoration"
TOGETHER, SHOWN = 8, 12  # photographs restored at once, rows of the sheet
PIXELS = 2**16  # of the samples that go through a network at once
COLUMNS = {"method": "", "photographs": "", "PSNR": ".2f", "SSIM": ".4f", "seconds": ".2f"}


@guarded
def restore(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Folders, zip or npz files, or images.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write into.")],
    recipe: Recipe = None,
    task: Annotated[str, typer.Option(help="box, super-resolution, random, tiles, sensing, or blur.")] = "box",
    amount: Annotated[float | None, typer.Option(help="How much of it, see the documentation.")] = None,
    method: Annotated[str, typer.Option(help="Of msm, a-dps, ddnm, tv-image, biharmonic, ...; by commas.")] = "msm",
    weights: Annotated[Path | None, typer.Option(help="Weights, or a folder of them, for the shipped ones.")] = None,
    samples: Annotated[int | None, typer.Option(help="Posterior samples of each photograph.")] = None,
    preset: Annotated[str, typer.Option(help="Settings of msm: restoration, or paper-restoration.")] = PRESET,
    option: MethodOptions = None,
    size: Annotated[int | None, typer.Option(help="Reduce to N x N; the size of the training without it.")] = None,
    split: Annotated[str, typer.Option(help="Of the photographs: all, train, or test.")] = "all",
    limit: Annotated[int | None, typer.Option(help="Only the first N photographs.")] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of noise, of values in [-1, 1].")] = 0.0,
    measured: Annotated[bool, typer.Option("--measured", help="The photographs are degraded already.")] = False,
    mask: Annotated[Path | None, typer.Option(help="What is known of them, black where lost: image or .npy.")] = None,
    seed: Annotated[int, typer.Option(help="Of operators, masks, noise and samples.")] = 0,
    faulty: Annotated[str, typer.Option(help="What to do with damaged or grey images: refuse, or skip.")] = "refuse",
    device: common.Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: common.DryRun = False,
    debug: common.Debug = False,
) -> None:
    """Restore photographs by one or several methods, and compare the results with the originals if they are known.

    Photographs are degraded first, in the same way for all methods and runs of one seed, unless --measured says that
    they are degraded already. Writes OUT/METHOD/NAME.png (the mean of the samples), NAME_spread.png (how uncertain it
    is; white is 0.5 of values in [-1, 1]) and restored.json (how they were made, and scores), OUT/sheet.png and
    OUT/scores.csv. Exit code 0: all done; 2: something to mend, the rest is done; 130: interrupted, --resume goes on.
    """
    from msmri.io.photos import read_photos
    from msmri.io.tasks import find_task

    common.at_least(limit, 1, "--limit")
    if noise < 0 or (mask is not None and not measured):
        raise InputError("--noise is negative" if noise < 0 else "--mask is for --measured photographs")
    chosen, place = find_task(task, amount), common.find_device(device)
    methods, told = load_methods(method, weights, option or [], samples, preset, place)
    wanted = size if size is not None or measured else told
    photos = read_photos(inputs, size=wanted, split=split, faulty=faulty)  # type: ignore[arg-type]
    if limit is not None:
        photos = dataclasses.replace(photos, pixels=photos.pixels[:limit], names=photos.names[:limit])
    known = read_mask(mask) if mask is not None else None
    problem = Problem(photos, chosen, noise, seed, measured, known)
    problem.measurement([0])  # what cannot be done is told before any work
    typer.echo(
        f"{len(photos)} photographs of {photos.shape[0]} x {photos.shape[1]}, {chosen.name} ({chosen.amount:g}: "
        f"{chosen.what}), by {', '.join(methods)}"
    )
    if dry_run:
        return
    if run(out, methods, problem, place, resume=resume, overwrite=overwrite, debug=debug, recipe=recipe):
        raise typer.Exit(common.MISTAKE)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Photographs and what is, or was, done to them."""

    photos: "Photos"
    task: "Task"
    noise: float
    seed: int
    measured: bool
    mask: "Mask | None"

    def measurement(self, index: list[int]) -> "Measurement":
        """Give some of the photographs as they are to be restored, with targets if these are known."""
        if self.measured:
            return self.task.degraded(self.photos, index, mask=self.mask, noise_std=self.noise)
        return self.task.degrade(self.photos, index, noise_std=self.noise, seed=self.seed)

    def describe(self) -> dict[str, Any]:
        """Give the settings that decide what is restored, all but the photographs' names."""
        mask = None if self.mask is None else self.mask.flatten().nonzero().flatten().tolist()
        told = {"task": self.task.name, "amount": self.task.amount, "noise": self.noise, "seed": self.seed}
        return {**told, "measured": self.measured, "mask": mask, "size": self.photos.shape}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A method with what tells it apart from itself with other settings."""

    method: "Reconstructor"
    settings: dict[str, Any]


def load_methods(
    names: str, weights: Path | None, options: list[str], samples: int | None, preset: str, device: str
) -> tuple[dict[str, Chosen], int | None]:
    """Build the methods, their weights loaded; give also the size of the photographs that the first was trained on."""
    from msmri.io.output import sha256
    from msmri.methods import available_methods, load_method

    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not wanted:
        raise InputError("--method names no method", mend="give one such as msm")
    given: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for text in options:
        key, equals, value = text.partition("=")
        name, dot, field = key.partition(".")
        if not (equals and dot) or name not in given:
            raise InputError(f"--option {text} is not METHOD.field=value of a method that is run", mend="msm.steps=20")
        given[name][field] = parse_value(value)
    methods, size, found = {}, None, available_methods()
    for name, changes in given.items():
        kind: Any = found[name].load() if name in found else None  # an unknown name is reported by load_method
        fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
        sums: dict[str, str] = {}
        holder = next((field for field in ("prior", "weights") if field in fields), None)
        if hasattr(kind, "preset"):
            base = kind.preset(preset)
            changes = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)} | changes
        if "samples" in fields and samples is not None:
            changes = {**changes, "samples": samples}
        if holder is not None:
            path = find_weights(name, changes.get(holder) or weights)
            model, trained = load_weights(name, path, device)
            changes, sums, size = {**changes, holder: model}, {"weights": sha256(path)}, size or trained
        method = load_method(name, **changes)
        told = {field: getattr(method, field, None) for field in sorted(fields - {holder, "batch"})}
        methods[name] = Chosen(method, {"method": name, **told, **sums})
    return methods, size


def find_weights(name: str, given: str | Path | None) -> Path:
    """Give the file of a method's weights: one that is given, in a folder that is given, or shipped."""
    from msmri.model.prior import shipped_prior

    path = Path(given) if given is not None else shipped_prior().parent
    if path.is_dir():
        path = path / WEIGHTS.get(name, f"{name}.safetensors")
    if not path.exists():
        raise InputError(
            f"{name} has no weights for photographs here", mend="train some with recipes/photos32_*.yaml", path=path
        )
    return path


def load_weights(name: str, path: Path, device: str) -> tuple[Any, int | None]:
    """Load the weights of a method, the size of what they were trained on beside them if they tell it."""
    import torch

    from msmri.model.checkpoint import read_header
    from msmri.model.prior import load_prior
    from msmri.physics.operators import Identity
    from msmri.physics.tiles import RandomTiles

    model: Any = load_prior(path, device=device, in_channels=3)
    header = read_header(path) if path.suffix == ".safetensors" else {}
    size = ((header.get("recipe") or {}).get("data") or {}).get("size")
    blank, mask = torch.zeros(1, 3, 32, 32, device=device), torch.ones(1, 1, 32, 32, dtype=torch.bool, device=device)
    try:
        with torch.inference_mode():
            if WEIGHTS.get(name) == "faces_ambient.safetensors":
                tried = model(blank, mask, 1.0, Identity())
            elif name != "msm" or hasattr(model, "denoise"):
                tried = model.denoise(blank, 1.0)
            else:
                tried = model(blank, mask, Identity(), torch.ones(1, 1, 1, 1, device=device))
        if tried.shape != blank.shape or tried.is_complex():
            raise ValueError(f"a real image became {tried.dtype} {tuple(tried.shape)}")
    except Exception as error:
        mend = "give weights trained for it on photographs"
        raise InputError(
            f"these are not weights of {name} for images of three colours", mend=mend, path=path
        ) from error
    if name == "msm" and getattr(model, "law", None) is None:
        model.law = RandomTiles()  # published weights do not tell what they were trained on
    return model, size if isinstance(size, int) else None


def read_mask(path: Path) -> "Mask":
    """Read what is known (1, y, x) from an image, black where pixels are lost, or a .npy file of 0 and 1."""
    import numpy as np
    import torch
    from PIL import Image

    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as picture:
                values = np.array(picture.convert("L"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError("is no readable mask", mend="give an image, black where pixels are lost", path=path) from error
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise InputError(f"holds a mask of shape {values.shape}", mend="give (y, x)", path=path)
    return torch.from_numpy(values > 0)[None]


def run(
    out: Path,
    methods: dict[str, Chosen],
    problem: Problem,
    device: str,
    *,
    resume: bool,
    overwrite: bool,
    debug: bool,
    recipe: Path | None = None,
) -> int:
    """Restore all photographs by all methods, say how well, draw a sheet; give the number of methods that failed."""
    from msmri.io.output import check_writable
    from msmri.io.restored import file_names

    files, made_by = file_names(problem.photos.names), provenance(recipe)
    if not resume:
        for name in methods:
            check_writable(out / name / "restored.json", overwrite=overwrite)
    failures, rows = {}, []
    try:
        with progress_bar() as bar:
            for name, chosen in methods.items():
                task = bar.add_task(name, total=len(files))
                try:
                    for row, many in restore_all(out / name, chosen, problem, files, device, made_by, resume=resume):
                        bar.update(task, advance=many)
                        rows.extend(row)
                except Exception as error:
                    if debug:
                        import traceback

                        traceback.print_exc()
                    failures[name] = one_line(error)
                    complain(f"{name}: {failures[name]}")
    except KeyboardInterrupt:
        complain("interrupted; repeat the command with --resume to go on where it stopped", kind="msmri")
        raise typer.Exit(common.INTERRUPTED) from None
    done = [name for name in methods if name not in failures]
    if done:
        report(out, done, rows, problem, files)
    return len(failures)


def restore_all(
    folder: Path,
    chosen: Chosen,
    problem: Problem,
    files: list[str],
    device: str,
    made_by: dict[str, Any],
    *,
    resume: bool,
) -> Any:
    """Restore group by group, yielding the rows of each; the manifest is written after every group."""
    import json
    import time

    from torch import Generator

    from msmri.io.output import environment, fingerprint, write_manifest
    from msmri.io.restored import write_photo, write_spread
    from msmri.physics.masks import slice_seed

    manifest, settings = folder / "restored.json", {**problem.describe(), **chosen.settings}
    method: Any = chosen.method
    if hasattr(method, "batch"):
        size = problem.measurement([0]).operator.adjoint(problem.measurement([0]).values).shape[-2:]
        method = dataclasses.replace(method, batch=max(4, PIXELS // size.numel()))
    kept: dict[str, dict[str, Any]] = {}
    if resume and manifest.exists():
        try:
            before = json.loads(manifest.read_text("utf-8"))
            same, kept = fingerprint(before["settings"]) == fingerprint(settings), before["photographs"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("is damaged", mend="use --overwrite", path=manifest) from error
        if not same:
            raise InputError("was made with other settings", mend="repeat those, or use --overwrite", path=manifest)
    record: dict[str, Any] = {**made_by, "settings": settings}
    record |= {"photographs": kept, "finished": False, "device": device, "environment": environment()}
    missing = [i for i, name in enumerate(problem.photos.names) if name not in kept]
    present = [kept[name] for name in problem.photos.names if name in kept]
    if present:
        yield present, len(present)
    for first in range(0, len(missing), TOGETHER):
        group = missing[first : first + TOGETHER]
        measurement = problem.measurement(group)
        names, begun = measurement.source, time.perf_counter()
        rng = [Generator().manual_seed(slice_seed(name, problem.seed)) for name in names]
        result = method(moved(dataclasses.replace(measurement, target=None), device), rng)
        seconds, images = (time.perf_counter() - begun) / len(group), result.image.cpu().clamp(-1, 1)
        rows = []
        for k, index in enumerate(group):
            write_photo(folder / f"{files[index]}.png", images[k])
            if result.std is not None:
                write_spread(folder / f"{files[index]}_spread.png", result.std[k])
            row = {"photograph": names[k], "file": f"{files[index]}.png", "method": chosen.settings["method"]}
            row |= scores(measurement, k, images[k]) | {"seconds": seconds, "NFE": result.details.get("NFE")}
            rows.append(row)
            kept[names[k]] = row
        write_manifest(manifest, record)
        yield rows, len(group)
    record["finished"] = True
    write_manifest(manifest, record)


def moved(measurement: "Measurement", device: str) -> "Measurement":
    """Put a measurement on a device, what its operator consists of too."""
    import torch

    def with_tensors(value: Any) -> Any:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: v.to(device) for k, v in fields.items() if isinstance(v, torch.Tensor)})

    return with_tensors(dataclasses.replace(measurement, encoding=with_tensors(measurement.encoding)))


def scores(measurement: "Measurement", index: int, image: "Tensor") -> dict[str, float | None]:
    """Score one restored photograph; data range 2, SSIM the mean over colours."""
    from msmri.metrics import WINDOW, psnr, ssim

    if measurement.target is None:
        return {"PSNR": None, "SSIM": None}
    target = measurement.target[index]
    similar = ssim(target, image, data_range=2.0) if min(image.shape[-2:]) >= WINDOW else None
    return {"PSNR": psnr(target, image, data_range=2.0), "SSIM": similar}


def report(out: Path, methods: list[str], rows: list[dict[str, Any]], problem: Problem, files: list[str]) -> None:
    """Print mean scores, write those of every photograph, and draw the sheet."""
    from msmri.io.restored import photo_sheet, read_photo
    from msmri.io.tasks import plain_input
    from msmri.report import markdown_table, write_csv

    everything = problem.measurement(list(range(len(files))))
    inputs = plain_input(everything).clamp(-1, 1)
    names = problem.photos.names
    plain = [
        {"method": "input", "photograph": name, **scores(everything, k, inputs[k])} for k, name in enumerate(names)
    ]
    table = []
    for name in ["input", *methods]:
        mine = [row for row in [*plain, *rows] if row["method"] == name]
        line: dict[str, Any] = {"method": name, "photographs": len(mine)}
        for key in ("PSNR", "SSIM", "seconds"):
            values = [row[key] for row in mine if row.get(key) is not None]
            line[key] = sum(values) / len(values) if values else None
        table.append(line)
    write_csv(out / "scores.csv", [*plain, *rows])
    shown = range(min(SHOWN, len(files)))
    known = [] if everything.target is None else ["truth"]
    lines = []
    for k in shown:
        truth = [] if everything.target is None else [everything.target[k]]
        lines.append([*truth, inputs[k], *(read_photo(out / name / f"{files[k]}.png") for name in methods)])
    photo_sheet(out / "sheet.png", lines, [*known, "input", *methods])
    typer.echo(f"\n{markdown_table(table, COLUMNS)}\nImages, sheet.png and scores.csv are in {out}")
