"""``--recipe``: settings of a command from a YAML file, which options of the command line replace."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from msmri.cli.common import MISTAKE, complain
from msmri.config import load_recipe, nearest
from msmri.errors import InputError

COMMAND = "command"  # the key that tells what a recipe is for; those of training have none
APART = {"out", "recipe", "device", "resume", "overwrite", "dry_run", "debug", "help"}  # of one run, not of a recipe
OPTIONS = "msmri.recipe.options"  # where a context keeps the recipe's --option


def require_command(recipe: Mapping[str, Any], command: str, path: Path) -> None:
    """Refuse a recipe that is meant for another command.

    Raises
    ------
    InputError
        If it is; tells which.
    """
    told = recipe.get(COMMAND, "train")
    if told != command:
        known = "those have no key 'command'" if command == "train" else f"those begin with 'command: {command}'"
        raise InputError(f"is a recipe of msmri {told}, not of msmri {command}", mend=known, path=path)


def provenance(recipe: Path | None) -> dict[str, Any]:
    """Give what a manifest says of its origin: the command, and the name and content of the recipe if there is one."""
    told = None if recipe is None else {"name": recipe.name, "content": load_recipe(recipe)}
    return {"command": shlex.join(["msmri", *sys.argv[1:]]), "recipe": told}


def _settings(context: typer.Context, path: Path) -> dict[str, str | list[str]]:
    """Read a recipe as the words that the command line would hold, by the names of parameters; checked."""
    recipe, command = load_recipe(path), str(context.info_name)
    require_command(recipe, command, path)
    options: dict[str, Any] = {
        max(option.opts, key=len).removeprefix("--"): option
        for option in context.command.params
        if option.param_type_name == "option" and option.name not in APART
    }
    settings = {}
    for key, value in recipe.items():
        if key == COMMAND:
            continue
        if key not in options:
            raise InputError(f"msmri {command} has no setting '{key}'", mend=nearest(key, options), path=path)
        settings[options[key].name] = _words(context, options[key], key, value, path)
    return settings


def _words(context: typer.Context, option: Any, key: str, value: Any, path: Path) -> str | list[str]:
    """Write the value of one option as on the command line, where it is checked as if it stood there."""
    values = value if option.multiple and isinstance(value, list) else [value]
    if not all(isinstance(one, (str, int, float)) for one in values):
        kind = "a list of values" if option.multiple else "one value"
        raise InputError(f"'{key}' cannot be {value!r}", mend=f"give {kind}", path=path)
    words = [str(one).lower() if isinstance(one, bool) else str(one) for one in values]
    found = words if option.multiple else words[0]
    try:
        option.process_value(context, found)
    except typer.BadParameter as error:
        why = " ".join(error.message.split())
        raise InputError(f"'{key}' cannot be {value!r} ({why})", mend="correct the recipe", path=path) from error
    return found


def _take(context: typer.Context, path: Path | None) -> Path | None:
    """Make the settings of a recipe the defaults of the command that runs."""
    if path is not None:
        try:
            settings = _settings(context, path)
        except InputError as error:
            complain(str(error))
            raise typer.Exit(MISTAKE) from None
        context.meta[OPTIONS] = settings.pop("option", [])
        context.default_map = settings
    return path


def _join(context: typer.Context, given: list[str] | None) -> list[str]:
    """Put the recipe's options of methods before those given, so that the latter win one by one."""
    return [*context.meta.get(OPTIONS, []), *(given or [])]


Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe", callback=_take, is_eager=True, help="YAML file of settings; options given besides replace them."
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", callback=_join, help="An option of a method, such as msm.steps=20; repeatable."),
]
