"""``msmri evaluate``: score reconstructions against references, with fastMRI's metrics."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msmri.cli import common
from msmri.cli.common import complain, guarded, one_line
from msmri.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("nmse", "psnr", "ssim", "mse")


@guarded
def evaluate(
    targets: Annotated[Path, typer.Argument(metavar="TARGET_DIR", help="Files with reconstruction_rss or _esc.")],
    reconstructions: Annotated[
        Path, typer.Argument(metavar="RECON_DIR", help="Files with reconstruction; or one such directory a method.")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the scores of every file as CSV.")] = None,
    square: Annotated[
        bool, typer.Option("--square", help="Crop to columns x columns first, as fastMRI's own script does.")
    ] = False,
    overwrite: common.Overwrite = False,
    debug: common.Debug = False,
) -> None:
    """Score every reconstruction against the reference of the same name: a volume at a time, as fastMRI does.

    Prints mean and standard deviation over files; data range of PSNR and SSIM is the maximum of the target volume.
    """
    from msmri.io.output import check_writable
    from msmri.metrics import CONVENTIONS
    from msmri.metrics import evaluate as score
    from msmri.report import markdown_table, write_csv

    for folder in (targets, reconstructions):
        if not folder.is_dir():
            raise InputError("is not a directory", mend="give directories of .h5 files", path=folder)
    if out is not None:
        check_writable(out, overwrite=overwrite)
    inside = sorted(reconstructions.glob("*.h5"))
    files = inside or sorted(reconstructions.glob("*/*.h5"))
    if not files:
        raise InputError("holds no .h5 file", mend="give the directory of a method", path=reconstructions)
    rows: list[dict[str, Any]] = []
    failed = 0
    for path in files:
        name = reconstructions.name if inside else path.parent.name
        try:
            target, image = _pair(targets / path.name, path, square=square)
            rows.append({"method": name, "file": path.name, "slices": len(target), **score(target, image)})
        except Exception as error:
            if debug:
                import traceback

                traceback.print_exc()
            failed += 1
            complain(one_line(error, path))
    unmatched = [p.name for p in sorted(targets.glob("*.h5")) if p.name not in {file.name for file in files}]
    if unmatched:
        complain(f"{len(unmatched)} targets have no reconstruction, such as {unmatched[0]}", kind="warning")
    if rows:
        formats = {"method": "", "files": "", **{f"{name}{end}": ".4g" for name in METRICS for end in ("", " ± std")}}
        typer.echo(markdown_table(_aggregate(rows), formats))
        typer.echo("\n".join(f"{name}: {CONVENTIONS[name]}" for name in METRICS))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_csv(out, rows)
    if failed:
        complain(f"{failed} of {len(files)} files failed", kind="msmri")
        raise typer.Exit(common.MISTAKE)


def _pair(target_path: Path, path: Path, *, square: bool) -> "tuple[Tensor, Tensor]":
    """Read a target volume and its reconstruction (slices, y, x), of the same slices and size."""
    from msmri.io.kspace import centre_crop
    from msmri.io.output import open_hdf5, read_reconstruction

    with open_hdf5(target_path) as file:
        known = [name for name in ("reconstruction_rss", "reconstruction_esc") if name in file]
    if not known:
        mend = "give files with reconstruction_rss or reconstruction_esc"
        raise InputError("has no reference", mend=mend, path=target_path)
    target, image = read_reconstruction(target_path, known[0]), read_reconstruction(path)
    with open_hdf5(path) as file:
        slices = file.attrs.get("slices")
    if slices is not None:  # a reconstruction of some of the slices says which
        if max(slices) >= len(target):
            raise InputError(f"has slice {max(slices)}, its target only {len(target)} slices", path=path)
        target = target[list(slices)]
    if square:
        target = centre_crop(target, (target.shape[-1], target.shape[-1]))
    rows, columns = target.shape[-2:]
    if len(image) != len(target) or image.shape[-2] < rows or image.shape[-1] < columns:
        raise InputError(
            f"is {tuple(image.shape)}, its target {tuple(target.shape)}", mend="compare volumes of one size", path=path
        )
    return target, centre_crop(image, (rows, columns))


def _aggregate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give mean and sample standard deviation over files, one row a method."""
    import statistics

    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        line: dict[str, Any] = {"method": method, "files": len(mine)}
        for name in METRICS:
            values = [row[name] for row in mine]
            line[name] = statistics.fmean(values)
            line[f"{name} ± std"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(line)
    return table
