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
    seed: common.Seed = 0,
    sets: common.Sets = "auto",
    crop_to: common.CropTo = None,
    coils: common.Coils = None,
    device: common.Device = "auto",
    overwrite: common.Overwrite = False,
    debug: common.Debug = False,
) -> None:
    """Estimate coil maps of every slice by ESPIRiT, for msmri recon --maps OUT.

    Without --mask they come from all that was measured. With it, from what that mask leaves, as msmri recon does.
    """
    from msmri.io.fastmri import list_scans, open_scan
    from msmri.io.output import check_writable, sha256, write_maps
    from msmri.preparation import Preparation

    preparation = Preparation(
        law=common.find_law(mask, acceleration, center_lines),
        seed=seed,
        sets=common.find_sets(sets),
        crop_to=common.at_least(crop_to, 16, "--crop-to"),
        coils=common.at_least(coils, 1, "--coils"),
        device=common.find_device(device),
    )
    files, failed = list_scans(inputs), []
    with progress_bar() as bar:
        for path in files:
            target = out / f"{path.stem}.h5"
            try:
                if target.absolute() == path.absolute():
                    raise InputError("the output would replace the input", mend="choose another -o", path=path)
                with open_scan(path) as scan:
                    check_writable(target, overwrite=overwrite)
                    if preparation.law is not None and scan.is_undersampled:
                        mend = "leave out --mask"
                        raise InputError("is undersampled already, so it cannot be given a mask", mend=mend, path=path)
                    task = bar.add_task(path.name, total=scan.n_slices)
                    settings = {"input": sha256(path), **preparation.describe()}
                    maps = bar.track(_maps(scan, preparation), task_id=task)
                    write_maps(target, maps, attributes=settings)
                    bar.remove_task(task)
                typer.echo(f"{target}")
            except Exception as error:
                if debug:
                    import traceback

                    traceback.print_exc()
                failed.append(path)
                complain(one_line(error, path))
    if failed:
        complain(f"{len(failed)} of {len(files)} files failed: {', '.join(p.name for p in failed)}", kind="msmri")
        raise typer.Exit(common.MISTAKE)


def _maps(scan: "Scan", preparation: "Preparation") -> "Iterator[Tensor]":
    """Yield the maps (set, coil, y, x) of one slice after the other, with one number of sets for the whole file."""
    from msmri.physics.espirit import Espirit
    from msmri.preparation import read_slice

    def estimate(index: int, sets: Any) -> "Tensor":
        measurement = read_slice(scan, index, preparation)
        kspace, mask = measurement.values.to(preparation.device), measurement.mask.to(preparation.device)
        return Espirit(sets=sets)(kspace, mask)[0]

    sets: Any = preparation.sets
    if sets == "auto":  # two if any slice needs them
        sets = 2 if any(len(estimate(index, "auto")) > 1 for index in range(scan.n_slices)) else 1
    for index in range(scan.n_slices):
        yield estimate(index, sets)
