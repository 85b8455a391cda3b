"""``msmri convert-weights``: published MSM weights as safetensors that say what they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msmri.cli import common
from msmri.cli.common import guarded
from msmri.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

KINDS = {2: "MRI (complex images)", 3: "photographs (colour)"}  # by real channels


@guarded
def convert_weights(
    source: Annotated[Path, typer.Argument(metavar="IN.pt", help="Published weights: a state dict of an ADM U-Net.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.")],
    head_channels: Annotated[
        int | None, typer.Option(help="Width of an attention head; known of the published networks, else 64.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Number of attention heads, in place of their width.")] = None,
    overwrite: common.Overwrite = False,
    debug: common.Debug = False,
) -> None:
    """Convert published MSM weights, once, into a file that any command takes as --prior.

    Tensors alone are read: a file that would run code is refused. The network is recognised by the names and shapes of
    its tensors. The header of OUT tells it, what the network predicts, the noise schedule, and name and checksum of IN.
    """
    from msmri.io.output import check_writable
    from msmri.model.checkpoint import convert_published

    common.at_least(head_channels, 1, "--head-channels")
    common.at_least(heads, 1, "--heads")
    if out.suffix != ".safetensors":
        raise InputError(f"cannot write weights as '{out.suffix}'", mend="name a .safetensors file", path=out)
    if out.absolute() == source.absolute():
        raise InputError("the output would replace the input", mend="choose another name", path=out)
    check_writable(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    header = convert_published(source, out, head_channels=head_channels, n_heads=heads, overwrite=overwrite)
    typer.echo(describe(header))
    typer.echo(f"{source.name} (SHA-256 {header['weights']['sha256'][:16]}) is now {out}")


def describe(header: "Mapping[str, Any]") -> str:
    """Say in one line what a converted network is."""
    network, schedule = header["network"], header["schedule"]
    attention = ", ".join(str(size) for size in network["attention_resolutions"]) or "none"
    kind = KINDS.get(network["in_channels"], f"{network['in_channels']} real channels")
    return (
        f"{kind}: ADM U-Net for {network['image_size']} x {network['image_size']}, {network['channels']} channels x "
        f"{tuple(network['channel_mult'])}, attention at {attention}; predicts {header['prediction']} on "
        f"{schedule['n_steps']} steps, beta {schedule['beta_min']:g} .. {schedule['beta_max']:g}"
    )
