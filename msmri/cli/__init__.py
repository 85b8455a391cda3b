"""The command line: one module a command; nothing heavy is imported before a command runs."""

import sys

import typer

from msmri import __version__
from msmri.allocation import keep_freed_memory
from msmri.cli.coils import coils
from msmri.cli.convert import convert_weights
from msmri.cli.demo import demo
from msmri.cli.diagnose import diagnose
from msmri.cli.distance import distance
from msmri.cli.evaluate import evaluate
from msmri.cli.info import info
from msmri.cli.mask import mask
from msmri.cli.recon import recon
from msmri.cli.restore import restore
from msmri.cli.sample import sample
from msmri.cli.train import train

app = typer.Typer(
    name="msmri",
    help="Reconstruct MRI scans with diffusion models that were never shown a clean image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, recon, sample, restore, train, coils, mask, evaluate, distance, info, diagnose, convert_weights):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"msmri {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Tell the version."),
) -> None:
    """Reconstruct MRI scans with diffusion models that were never shown a clean image."""


def main() -> None:
    """Run the command line; exit code 0 is success, 1 a defect, 2 a mistake to mend, 130 an interruption (Ctrl-C)."""
    keep_freed_memory()
    try:
        app()
    except KeyboardInterrupt:  # before or after the command itself
        sys.exit(130)
