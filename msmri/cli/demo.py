"""``msmri demo``: reconstruct the scan that comes with msmri with every built-in method."""

from pathlib import Path
from typing import Annotated

import typer

from msmri.cli import common
from msmri.cli.common import guarded
from msmri.errors import InputError

SCAN = "demo_brain.h5"  # in msmri/data
METHODS = "zero-filled,cg-sense,l1-wavelet,tv,msm"


@guarded
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write into.")] = Path("msmri-demo"),
    acceleration: common.Acceleration = 4.0,
    method: Annotated[str, typer.Option(help="Methods, by commas.")] = METHODS,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    debug: common.Debug = False,
) -> None:
    """Undersample the demo brain scan, reconstruct it with every method, and compare them in a table and a figure."""
    from importlib.resources import as_file, files

    from msmri.cli.recon import load_methods, run
    from msmri.preparation import Preparation

    shipped = files("msmri") / "data" / SCAN
    if not shipped.is_file():
        raise InputError("the demo scan is not part of this installation", mend="install msmri again", path=SCAN)
    preparation = Preparation(
        law=common.find_law("random-lines", acceleration, None), seed=seed, device=common.find_device(device)
    )
    with as_file(shipped) as path:
        failed = run([path], load_methods(method, [], {}), out, preparation, overwrite=True, debug=debug)
    if failed:
        raise typer.Exit(common.MISTAKE)
    for figure in sorted(out.glob(f"{Path(SCAN).stem}_slice*.png")):
        typer.echo(f"Look at {figure}")
