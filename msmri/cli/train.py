"""``msmri train``: train a prior by recipe on undersampled k-space."""

from pathlib import Path
from typing import Annotated

import typer

from msmri.cli import common
from msmri.cli.common import complain, guarded, progress_bar


@guarded
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, such as those in recipes/.")],
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of weights, curve and log.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of the recipe: train.lr=1e-4; repeatable.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of initial weights, batches and noise: short for --set train.seed=...")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the last saved state.")] = True,
    device: common.Device = "auto",
    dry_run: common.DryRun = False,
    debug: common.Debug = False,
) -> None:
    """Train a prior by recipe; interrupted (Ctrl-C), the same command goes on where it stopped."""
    from msmri.cli.recipe import require_command
    from msmri.config import load_recipe

    resolved = load_recipe(recipe, settings or [])
    require_command(resolved, "train", recipe)
    if seed is not None:
        resolved["train"] = {**(resolved.get("train") or {}), "seed": seed}
    if dry_run:
        import yaml

        from msmri.train import rehearse

        typer.echo(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip())
        typer.echo(f"# {rehearse(resolved)}")
        return
    from msmri.train import train as steps

    record = None
    try:
        with progress_bar() as bar:
            task = bar.add_task("training", total=None)
            for record in steps(resolved, run, device=common.find_device(device), resume=resume):
                text = f"loss {record.loss:.4g}"
                bar.update(task, completed=record.step, total=record.n_steps, description=text)
    except KeyboardInterrupt:
        where = f" at step {record.step} of {record.n_steps}" if record is not None else ""
        complain(f"interrupted{where}; repeat the command to go on from the last saved state", kind="msmri")
        raise typer.Exit(common.INTERRUPTED) from None
    if record is not None:
        typer.echo(f"{record.step} steps, loss {record.loss:.4g}, {record.seconds:.0f} s; the weights are in {run}")
