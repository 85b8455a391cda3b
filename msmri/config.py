"""Recipes: YAML files that say what to run, with overrides, and nodes that name code to build."""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from msmri.errors import InputError

TRUST = ("msmri",)  # top-level packages that a recipe may name code of
USE = "use"  # key of a node that names code: "package.module:Name"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with two mends: 1e-4 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys, of which YAML would silently keep the last."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            if isinstance(key, str | int | float | bool):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # YAML 1.2's numbers: PyYAML, after YAML 1.1, takes 1e-4 for text
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """Read one value as YAML would: ``4``, ``1e-4``, ``true``, ``null``, ``[1, 2]``, or text.

    Raises
    ------
    InputError
        If it is not valid YAML, such as an open bracket.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"cannot read the value {text!r}", mend="quote text that holds special characters") from error


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a YAML recipe and apply overrides such as ``train.lr=1e-4``.

    Parameters
    ----------
    path
        The file: a mapping at its top.
    overrides
        ``section.key=value``, the value in YAML. A number as key counts from 0 in a list. The last key may be new,
        the sections above it must exist.

    Raises
    ------
    InputError
        If the file cannot be read or is not a mapping, or an override does not fit; names the file, line and key.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("is not a text file", mend="give a YAML recipe", path=path) from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", mend="check the name", path=path) from error
    try:
        recipe = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{line}{error.problem or 'is not YAML'}", mend="correct the recipe", path=path) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError("is not a YAML recipe", mend="give a text file of keys and values", path=path) from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise InputError("is not a mapping of names to values", mend="write one 'key: value' a line", path=path)
    for override in overrides:
        try:
            _override(recipe, override)
        except InputError as error:
            raise InputError(error.problem, mend=error.mend, path=path) from None
    return recipe


def _override(recipe: dict[str, Any], override: str) -> None:
    """Set one value inside ``recipe``, in place."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"override {override!r} is not of the form section.key=value", mend="write train.lr=1e-4")
    place: Any = recipe
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth]) or "the recipe"
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise InputError(f"override {name!r}: {here} is a list of {len(place)}, with no entry {key}")
        elif not isinstance(place, dict):
            raise InputError(f"override {name!r}: {here} is a value, not a section")
        index = int(key) if isinstance(place, list) else key
        if depth == len(keys) - 1:
            place[index] = parse_value(text)
        elif isinstance(place, dict) and key not in place:
            raise InputError(f"override {name!r}: {here} has no section {key!r}", mend=nearest(key, place))
        else:
            place = place[index]


def build(node: Any, trust: Sequence[str] = TRUST, *, where: str = "", **given: Any) -> Any:
    """Build what a node describes; nodes inside it first.

    A mapping with the key ``use`` becomes a call of the class or function it names, ``package.module:Name``, with its
    other keys as arguments. Other mappings and lists are built entry by entry; plain values stay as they are.

    Parameters
    ----------
    node
        A recipe or part of one.
    trust
        Top-level packages whose code may be named; nothing of any other is imported.
    where
        Place of the node in the recipe, such as ``model.network``, for messages.
    **given
        Arguments that the caller adds to those of the node.

    Raises
    ------
    InputError
        If code of another package is named, if it does not exist, or if the arguments do not fit its signature.
    """
    if isinstance(node, list):
        return [build(item, trust, where=f"{where}[{index}]") for index, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    inner = f"{where}." if where else ""
    values = {key: build(value, trust, where=f"{inner}{key}") for key, value in node.items() if key != USE}
    if USE not in node:
        return values
    place = f"{where}: " if where else ""
    target = _find(node[USE], trust, place)
    both = sorted(values.keys() & given.keys())
    if both:
        raise InputError(f"{place}'{both[0]}' of {node[USE]} is set by the program", mend="leave it out")
    arguments = values | given
    _check(target, arguments, f"{place}{node[USE]}")
    try:
        return target(**arguments)
    except InputError as error:
        raise InputError(f"{place}{error.problem}", mend=error.mend, path=error.path) from error
    except TypeError as error:
        raise InputError(f"{place}{node[USE]} does not accept these arguments ({error})") from error


def _find(use: Any, trust: Sequence[str], place: str) -> Any:
    """Import the class or function that ``use`` names, from a trusted package alone."""
    if not isinstance(use, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z]\w*", use):
        raise InputError(f"{place}use: {use!r} names no code", mend='write "package.module:Name"')
    module_name, name = use.split(":")
    root = module_name.split(".")[0]
    if root not in trust:
        mend = f"trust it explicitly if you know it; trusted: {', '.join(trust)}"
        raise InputError(f"{place}code of the package '{root}' is not trusted ({use})", mend=mend)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{place}cannot import {module_name} ({error})", mend="check the spelling of use") from error
    target = getattr(module, name, None)
    names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    if target is None:
        raise InputError(f"{place}{module_name} has no '{name}'", mend=nearest(name, names))
    origin = str(getattr(target, "__module__", "")).split(".")[0]
    if not callable(target) or origin not in trust:  # else "msmri.io:Path" would open the way to everything imported
        raise InputError(f"{place}{use} is no class or function of a trusted package", mend="name one that is")
    return target


def _check(target: Any, arguments: Mapping[str, Any], label: str) -> None:
    """Check arguments against a signature, before anything is called."""
    parameters = inspect.signature(target).parameters
    keywords = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in arguments:
        if name not in keywords and not open_ended:
            raise InputError(f"{label} has no argument '{name}'", mend=nearest(str(name), keywords))
    missing = [
        name for name, parameter in keywords.items() if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise InputError(f"{label} needs {', '.join(missing)}", mend="add it to the recipe")


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the nearest known word, or all of them."""
    words = [str(word) for word in known]
    near = difflib.get_close_matches(name, words, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(words) or 'none'}"
