"""``msmri recon``: reconstruct files with one or several methods, and score what can be scored."""

import dataclasses
import warnings
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msmri.cli import common
from msmri.cli.common import complain, guarded, one_line, progress_bar
from msmri.cli.recipe import MethodOptions, Recipe, provenance
from msmri.config import parse_value
from msmri.errors import InputError

if TYPE_CHECKING:
    from msmri.methods import Reconstructor
    from msmri.preparation import Preparation

SCORES = {"PSNR": ".2f", "SSIM": ".4f", "NMSE": ".5f", "object PSNR": ".2f", "object SSIM": ".4f"}
COLUMNS = {"method": "", "true R": ".2f", **SCORES, "seconds": ".1f"}


@guarded
def recon(
    inputs: common.Inputs,
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write into.")],
    recipe: Recipe = None,
    method: Annotated[str, typer.Option(help="Of zero-filled, cg-sense, l1-wavelet, tv, msm, ...; by commas.")] = "msm",
    mask: common.MaskOption = None,
    acceleration: common.Acceleration = 4.0,
    center_lines: common.CenterLines = None,
    mask_per: common.MaskPer = "slice",
    noise: Annotated[
        float, typer.Option(help="Noise to add before --mask: std of a real component over the image's maximum.")
    ] = 0.0,
    seed: common.Seed = 0,
    option: MethodOptions = None,
    prior: Annotated[Path | None, typer.Option(help="Weights of the diffusion prior, for the shipped ones.")] = None,
    samples: Annotated[int | None, typer.Option(help="Posterior samples of each slice.")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of msm: default, or paper.")] = None,
    maps: Annotated[Path | None, typer.Option(help="Coil maps of msmri coils: a file, or a directory.")] = None,
    maps_as_they_are: Annotated[
        bool,
        typer.Option("--maps-as-they-are", help="Use --maps even of another scan, and say nothing; manifests tell."),
    ] = False,
    sets: common.Sets = "auto",
    crop_to: common.CropTo = None,
    coils: common.Coils = None,
    slices: common.Slices = None,
    figure_slices: Annotated[str | None, typer.Option(help="Slices to draw; the middle one without it.")] = None,
    tune: Annotated[
        list[Path] | None, typer.Option(help="Fully sampled validation scan to choose weights on; repeatable.")
    ] = None,
    device: common.Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: common.DryRun = False,
    debug: common.Debug = False,
) -> None:
    """Reconstruct scans, each slice with every method, and compare them.

    Undersampled input is reconstructed as it was measured. Fully sampled input is undersampled with --mask, one mask
    for each slice, seeded by the slice's name and --seed, and the result is scored against the full data.

    Writes OUT/METHOD/NAME.h5 (fastMRI's layout) and .json (how it was made), OUT/NAME_sliceK.png and OUT/scores.csv.
    Exit code 0: all done; 2: some files could not be used, the rest is done; 130: interrupted.
    """
    from msmri.preparation import Preparation

    if mask_per not in ("slice", "file"):
        raise InputError(f"--mask-per {mask_per} is not slice or file")
    if maps is not None and not maps.exists():
        raise InputError("no such file or directory", mend="make coil maps with msmri coils", path=maps)
    if not 0 <= noise < float("inf") or (noise > 0 and mask is None):
        raise InputError(f"--noise {noise:g} cannot be added", mend="give 0 or more, and --mask with it")
    if maps_as_they_are and maps is None:
        raise InputError("--maps-as-they-are is of no use without maps", mend="give --maps, or leave it out")
    preparation = Preparation(
        law=common.find_law(mask, acceleration, center_lines),
        seed=seed,
        mask_per=mask_per,  # type: ignore[arg-type]
        noise=noise,
        sets=common.find_sets(sets),
        maps=maps,
        crop_to=common.at_least(crop_to, 16, "--crop-to"),
        coils=common.at_least(coils, 1, "--coils"),
        device=common.find_device(device),
        trust_maps=maps_as_they_are,
    )
    shared = {"prior": prior, "samples": samples, "preset": preset}
    methods = load_methods(method, option or [], {name: value for name, value in shared.items() if value is not None})
    failed = run(
        inputs,
        methods,
        out,
        preparation,
        slices=common.find_slices(slices),
        figure_slices=common.find_slices(figure_slices),
        tune=tune or [],
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        debug=debug,
        recipe=recipe,
    )
    if failed:
        raise typer.Exit(common.MISTAKE)


def load_methods(names: str, options: list[str], shared: dict[str, Any]) -> "dict[str, Reconstructor]":
    """Build the methods; ``shared`` options go to every method that has them, and must be of use to one."""
    import inspect

    from msmri.methods import available_methods, load_method

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError("--method names no method", mend="give one such as msm")
    given: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for text in options:
        key, equals, value = text.partition("=")
        name, dot, field = key.partition(".")
        if not (equals and dot):
            raise InputError(f"--option {text} is not METHOD.field=value", mend="write l1-wavelet.weight=1e-3")
        if name not in given:
            raise InputError(f"--option {text} is for '{name}', which is not run", mend="add it to --method")
        given[name][field] = parse_value(value)
    used: set[str] = set()
    methods = {}
    found = available_methods()
    for name, fields in given.items():
        kind: Any = found[name].load() if name in found else None  # an unknown name is reported by load_method
        accepted = inspect.signature(kind).parameters if kind is not None else {}
        for option, value in shared.items():
            if option == "preset" and hasattr(kind, "preset"):
                base = kind.preset(value)
                fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)} | fields
                used.add(option)
            elif option in accepted:
                fields = {**fields, option: value}
                used.add(option)
        if name == "msm":
            fields = {**fields, "prior": checked_prior(fields.get("prior"))}
        methods[name] = load_method(name, **fields)
    if unused := sorted(shared.keys() - used):
        raise InputError(f"--{unused[0]} is of no use to {', '.join(wanted)}", mend="add msm to --method")
    return methods


def checked_prior(prior: str | Path | None) -> Path:
    """Give the weights file, the shipped one by default, once tried and dropped: a bad one is told of before work.

    Weights of photographs, and of other methods, are no prior of scans.
    """
    import torch

    from msmri.model.checkpoint import read_header
    from msmri.model.prior import load_prior, shipped_prior
    from msmri.physics.operators import CoilFourier
    from msmri.sampling.aggregate import ImagePartial

    path = Path(prior) if prior is not None else shipped_prior()
    model: Any = load_prior(path, in_channels=2)  # one complex channel
    blank = torch.zeros(1, 1, 32, 32, dtype=torch.complex64)
    mask, encoding = torch.ones(1, 1, 1, 32, dtype=torch.bool), CoilFourier(torch.ones(1, 1, 1, 32, 32) + 0j)
    try:
        partial = ImagePartial(model) if hasattr(model, "denoise") else model
        with torch.inference_mode():
            tried = partial(blank, mask, encoding, torch.ones(1, 1, 1, 1))
        if tried.shape != blank.shape or not tried.is_complex():
            raise ValueError(f"complex k-space became {tried.dtype} {tuple(tried.shape)}")
    except Exception as error:
        mend = "give weights that msmri trained by an MSM recipe on scans, or published ones"
        raise InputError("these are not weights of msm for complex images", mend=mend, path=path) from error
    recipe = read_header(path).get("recipe") if path.suffix == ".safetensors" else None
    if isinstance(recipe, dict) and "FullScans" in str((recipe.get("data") or {}).get("use")):
        warnings.warn(f"{path.name} was trained on fully sampled scans: it is no prior of MSM's kind", stacklevel=2)
    return path


def run(
    inputs: list[Path],
    methods: "dict[str, Reconstructor]",
    out: Path,
    preparation: "Preparation",
    *,
    slices: Any = None,
    figure_slices: Any = None,
    tune: list[Path] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    debug: bool = False,
    recipe: Path | None = None,
) -> int:
    """Reconstruct all files with a progress bar and a table at the end; give the number of failed ones."""
    from msmri.io.fastmri import list_scans
    from msmri.pipeline import reconstruct_file

    files = list_scans(inputs)
    notes = provenance(recipe)
    if tune and not dry_run:
        methods, notes["tuning"] = tuned(methods, tune, files, preparation)
    if methods.keys() & {"l1-wavelet", "tv"}:
        import sigpy.app  # noqa: F401  (seconds to import, which are not theirs in the table)
    failures: dict[Path, str] = {}
    done: dict[str, Path] = {}
    try:
        with progress_bar() as bar:
            for number, path in enumerate(files, 1):
                task = bar.add_task(f"{path.name} ({number}/{len(files)})", total=None)
                try:
                    if path.stem in done:
                        mend = "reconstruct it into another directory"
                        raise InputError(f"has the same name as {done[path.stem]}", mend=mend, path=path)
                    if dry_run:
                        typer.echo(plan(path, list(methods), out, preparation, slices))
                        done[path.stem] = path
                        continue
                    steps = reconstruct_file(
                        path,
                        methods,
                        out,
                        preparation,
                        slices=slices,
                        figure_slices=figure_slices,
                        resume=resume,
                        overwrite=overwrite,
                        notes=notes,
                    )
                    with closing(steps):
                        for step in steps:
                            bar.update(task, advance=1, total=step.total, description=f"{path.name} {step.method}")
                    done[path.stem] = path
                except Exception as error:
                    if debug:
                        import traceback

                        traceback.print_exc()
                    failures[path] = one_line(error, path)
                    complain(failures[path])
                finally:
                    bar.remove_task(task)
    except KeyboardInterrupt:
        complain("interrupted; repeat the command with --resume to go on where it stopped", kind="msmri")
        raise typer.Exit(common.INTERRUPTED) from None
    if not dry_run:
        _report(out, done, list(methods))
    if failures:
        names = ", ".join(path.name for path in failures)
        complain(f"{len(failures)} of {len(files)} files failed: {names}", kind="msmri")
    return len(failures)


def plan(path: Path, methods: list[str], out: Path, preparation: "Preparation", slices: Any) -> str:
    """Say what would be done with a file, after the checks that need no computing."""
    from msmri.io.fastmri import open_scan
    from msmri.physics.masks import MaskLaw
    from msmri.pipeline import choose_slices
    from msmri.preparation import check_maps, require_sampling

    with open_scan(path) as scan:
        require_sampling(scan, preparation)
        check_maps(scan, preparation)
        indices = choose_slices(slices, scan)
        rows, columns = scan.kspace_shape[2:]
        sampling = "undersampled already"
        if isinstance(preparation.law, MaskLaw):
            size = preparation.crop_to or max(rows, columns)
            sampling = preparation.law.describe((min(rows, size), min(columns, size)))
        elif preparation.law is not None:
            sampling = "the given mask"
        return (
            f"{path}: {len(indices)} of {scan.n_slices} slices, {scan.n_coils} coils, {rows} x {columns} -> "
            f"{' x '.join(map(str, scan.output_shape))}; {sampling}; {', '.join(methods)} -> {out}"
        )


def tuned(
    methods: "dict[str, Reconstructor]", tune: list[Path], files: list[Path], preparation: "Preparation"
) -> "tuple[dict[str, Reconstructor], dict[str, Any]]":
    """Choose the weight of every method that has one on validation scans, which must not be reconstructed here."""
    from msmri.io.fastmri import list_scans
    from msmri.methods.tuning import tune as choose
    from msmri.preparation import cropped_psnr, measurements

    scans = list_scans(tune)
    for path in scans:
        if path.resolve() in {file.resolve() for file in files}:
            raise InputError("is to be reconstructed too", mend="tune on other scans", path=path)
    validation = [measurement for path in scans for measurement in measurements(path, preparation)]
    result, tables = {}, {}
    for name, method in methods.items():
        fields = list(getattr(method, "tunable", {}))
        if not fields:
            result[name] = method
            continue
        result[name], tables[name] = choose(method, validation, metric=cropped_psnr, seed=preparation.seed)
        typer.echo(f"{name}: {fields[0]}={getattr(result[name], fields[0]):.4g} chosen on {len(validation)} slices")
    return result, {"scans": [str(path) for path in scans], "tables": tables}


def _report(out: Path, done: dict[str, Path], methods: list[str]) -> None:
    """Print the mean scores of this run, and write a row for every file and method in ``out`` to its scores.csv."""
    import json

    from msmri.pipeline import summary_row
    from msmri.report import markdown_table, write_csv

    rows = []
    for manifest in sorted(out.glob("*/*.json")):
        try:
            rows.append({"stem": manifest.stem, **summary_row(json.loads(manifest.read_text("utf-8")))})
        except (ValueError, KeyError, TypeError):
            continue  # no manifest of msmri's
    if not done or not rows:
        return
    table = []
    for name in methods:
        mine = [row for row in rows if row["method"] == name and row["stem"] in done]
        if mine:
            keys = {
                "true R": "true R",
                **{name: name.lower().replace(" ", "_") for name in SCORES},
                "seconds": "seconds",
            }
            table.append({"method": name, **{shown: _mean(mine, key) for shown, key in keys.items()}})
    typer.echo(f"\nMean over {len(done)} file{'s' if len(done) > 1 else ''}:\n\n{markdown_table(table, COLUMNS)}")
    write_csv(out / "scores.csv", [{key: value for key, value in row.items() if key != "stem"} for row in rows])
    typer.echo(f"Images, figures and scores.csv are in {out}")


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None
