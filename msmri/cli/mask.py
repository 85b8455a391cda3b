"""``msmri mask``: draw an undersampling mask and describe it."""

import re
from pathlib import Path
from typing import Annotated

import typer

from msmri.cli import common
from msmri.cli.common import guarded
from msmri.errors import InputError


@guarded
def mask(
    law: Annotated[
        str,
        typer.Option(
            help="random-lines, equispaced-lines, gaussian-lines, poisson-disc, fastmri-random, fastmri-equispaced, "
            "fastmri-equispaced-fraction or fastmri-magic."
        ),
    ] = "random-lines",
    acceleration: common.Acceleration = 4.0,
    center_lines: common.CenterLines = None,
    shape: Annotated[
        str, typer.Option(help="Rows x columns of k-space; columns are the undersampled axis.")
    ] = "256x256",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the mask: .npy or .png.")] = None,
    overwrite: common.Overwrite = False,
) -> None:
    """Draw a mask; tell what its law promises and what was drawn."""
    import numpy as np
    from torch import Generator

    from msmri.io.output import atomic, check_writable
    from msmri.physics.masks import MaskLaw, blind_spots, centre_width
    from msmri.physics.masks import acceleration as true_acceleration

    sizes = re.fullmatch(r"([1-9]\d*)[x×,]([1-9]\d*)", shape)
    if sizes is None:
        raise InputError(f"cannot read --shape {shape}", mend="give rows x columns such as 256x256")
    matrix = int(sizes[1]), int(sizes[2])
    if out is not None:
        if out.suffix not in (".npy", ".png"):
            raise InputError(f"cannot write a mask as '{out.suffix}'", mend="name a .npy or .png file", path=out)
        check_writable(out, overwrite=overwrite)
    chosen = common.find_law(law, acceleration, center_lines)
    if not isinstance(chosen, MaskLaw):
        raise InputError("--law wants the name of a law, not a file", path=law)
    drawn = chosen.draw(matrix, Generator().manual_seed(seed))
    blind = int(blind_spots(chosen, matrix).sum())
    unit = "lines" if chosen.lines else "places"
    typer.echo(chosen.describe(matrix))
    typer.echo(
        f"drawn with seed {seed}: acceleration {true_acceleration(drawn):.2f} "
        f"({int(drawn.sum())} of {drawn.numel()} {unit}), {centre_width(drawn)} contiguous centre lines"
    )
    typer.echo(f"blind spots: {blind} {unit} are never sampled" + (", so it cannot train MSM" if blind else ""))
    if out is not None:
        values = np.broadcast_to(drawn[0].numpy(), matrix)
        with atomic(out) as part:
            if out.suffix == ".npy":
                with part.open("wb") as file:
                    np.save(file, drawn[0].numpy().squeeze())
            else:
                from matplotlib.image import imsave

                imsave(part, values, cmap="gray", vmin=0, vmax=1, format="png")
        typer.echo(f"{out}")
