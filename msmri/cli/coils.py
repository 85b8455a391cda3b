"""``msmri coils``: estimate coil maps by ESPIRiT and keep them for later runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msmri.cli import common
from msmri.cli.common import complain, guarded, one_line, progress_bar
from msmri.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from msmri.io.fastmri import Scan
    from msmri.preparation import Preparation


@guarded
def coils(
    inputs: common.Inputs,
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write into, one file a scan.")],
    mask: common.MaskOption = None,
    acceleration: common.Acceleration = 4.0,
    center_lines: common.CenterLines = None,
    mask_per: common.MaskPer = "slice",
    noise: Annotated[
        float, typer.Option(help="Noise to add before --mask: std of a real component over the image's maximum.")
    ] = 0.0,
    seed: common.Seed = 0,
    sets: common.Sets = "auto",
    crop_to: common.CropTo = None,
    coils: common.Coils = None,
    kernel_width: Annotated[int, typer.Option(help="Largest kernel of ESPIRiT.")] = 6,
    threshold: Annotated[float, typer.Option(help="Singular values below this share of the largest are noise.")] = 0.02,
    eigenvalue_crop: Annotated[
        float, typer.Option(help="Maps are zero where the eigenvalue is not above this; 0 keeps all.")
    ] = 0.8,
    calibration_width: Annotated[int, typer.Option(help="Central rows and columns to read at most.")] = 24,
    device: common.Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: common.DryRun = False,
    debug: common.Debug = False,
) -> None:
    """Estimate coil maps of every slice by ESPIRiT, for msmri recon --maps OUT.

    Without --mask they come from all that was measured. With it, from what that mask leaves, as msmri recon does.
    """
    from msmri.io.fastmri import list_scans, open_scan
    from msmri.io.output import write_maps
    from msmri.physics.espirit import Espirit
    from msmri.preparation import Preparation, made_from

    if mask_per not in ("slice", "file"):
        raise InputError(f"--mask-per {mask_per} is not slice or file")
    if not 0 <= noise < float("inf") or (noise > 0 and mask is None):
        raise InputError(f"--noise {noise:g} cannot be added", mend="give 0 or more, and --mask with it")
    for share, option in ((threshold, "--threshold"), (eigenvalue_crop, "--eigenvalue-crop")):
        if not 0 <= share < 1:
            raise InputError(f"{option} {share:g} is no share", mend="give 0 or more, and less than 1")
    common.at_least(kernel_width, 3, "--kernel-width")
    common.at_least(calibration_width, 4, "--calibration-width")
    preparation = Preparation(
        law=common.find_law(mask, acceleration, center_lines),
        seed=seed,
        mask_per=mask_per,  # type: ignore[arg-type]
        noise=noise,
        sets=common.find_sets(sets),
        crop_to=common.at_least(crop_to, 16, "--crop-to"),
        coils=common.at_least(coils, 1, "--coils"),
        device=common.find_device(device),
        espirit=Espirit(
            kernel_width=kernel_width, threshold=threshold, crop=eigenvalue_crop, max_calibration=calibration_width
        ),
    )
    files, failed = list_scans(inputs), []
    done: dict[str, Path] = {}
    try:
        with progress_bar() as bar:
            for path in files:
                target = out / f"{path.stem}.h5"
                try:
                    if path.stem in done:
                        mend = "write its maps into another directory"
                        raise InputError(f"has the same name as {done[path.stem]}", mend=mend, path=path)
                    with open_scan(path) as scan:
                        settings = made_from(scan, preparation)
                        finished = _check(scan, target, preparation, settings, resume=resume, overwrite=overwrite)
                        if not (dry_run or finished):
                            task = bar.add_task(path.name, total=scan.n_slices)
                            maps = bar.track(_maps(scan, preparation), task_id=task)
                            write_maps(target, maps, attributes=settings)
                            bar.remove_task(task)
                        done[path.stem] = path
                        what = f"{scan.n_slices} slices, {scan.n_coils} coils"
                        state = " (done already)" if finished else ""
                        typer.echo(f"{path}: {what} -> {target}{state}" if dry_run else f"{target}")
                except Exception as error:
                    if debug:
                        import traceback

                        traceback.print_exc()
                    failed.append(path)
                    complain(one_line(error, path))
    except KeyboardInterrupt:
        complain("interrupted; repeat the command with --resume to go on where it stopped", kind="msmri")
        raise typer.Exit(common.INTERRUPTED) from None
    if failed:
        complain(f"{len(failed)} of {len(files)} files failed: {', '.join(p.name for p in failed)}", kind="msmri")
        raise typer.Exit(common.MISTAKE)


def _check(
    scan: "Scan",
    target: Path,
    preparation: "Preparation",
    settings: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
) -> bool:
    """Check that maps can be made and written; tell whether an earlier run with the same settings has made them."""
    from msmri.io.maps import maps_settings
    from msmri.io.output import check_writable

    if target.absolute() == scan.path.absolute():
        raise InputError("the output would replace the input", mend="choose another -o", path=scan.path)
    if preparation.law is not None and scan.is_undersampled:
        mend = "leave out --mask"
        raise InputError("is undersampled already, so it cannot be given a mask", mend=mend, path=scan.path)
    if resume and target.is_file():
        found = maps_settings(target) or {}
        if found == settings:
            return True
        if not overwrite:
            differing = [key for key in sorted(found.keys() | settings.keys()) if found.get(key) != settings.get(key)]
            raise InputError(
                f"was made with other settings ({', '.join(differing)})",
                mend="repeat those settings, choose another -o, or --overwrite",
                path=target,
            )
    check_writable(target, overwrite=overwrite)
    return False


def _maps(scan: "Scan", preparation: "Preparation") -> "Iterator[Tensor]":
    """Yield the maps (set, coil, y, x) of one slice after the other, with one number of sets for the whole file."""
    from dataclasses import replace

    from msmri.preparation import read_slice

    def estimate(index: int, sets: Any) -> "Tensor":
        measurement = read_slice(scan, index, preparation)
        kspace, mask = measurement.values.to(preparation.device), measurement.mask.to(preparation.device)
        return replace(preparation.espirit, sets=sets)(kspace, mask)[0]

    sets: Any = preparation.sets
    if sets == "auto":  # two if any slice needs them
        sets = 2 if any(len(estimate(index, "auto")) > 1 for index in range(scan.n_slices)) else 1
    for index in range(scan.n_slices):
        yield estimate(index, sets)
