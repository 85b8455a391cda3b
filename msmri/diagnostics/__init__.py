"""What can be measured about mask laws, priors and samplers: a diagnostic gives numbers, sentences and one figure."""

import inspect
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from msmri.errors import InputError

DIAGNOSTICS: Mapping[str, str] = {
    "coverage": "msmri.diagnostics.coverage:coverage",
    "score-variance": "msmri.diagnostics.score_variance:score_variance",
    "noisy-reference": "msmri.diagnostics.noisy_reference:noisy_reference",
    "choose-w": "msmri.diagnostics.choose_w:choose_w",
    "resolution": "msmri.diagnostics.resolution:resolution",
    "adapt": "msmri.diagnostics.adaptation:adaptation",
    "calibration": "msmri.diagnostics.calibration:calibration",
}
MAY_BE_ZERO = frozenset({"crop_to", "noise_std"})  # of the numbers among options; all others are positive


@dataclass(frozen=True)
class Finding:
    """What a diagnostic found."""

    numbers: dict[str, Any]  # everything measured, for JSON
    learned: tuple[str, ...]  # sentences made of the numbers
    draw: Callable[[Path], None]  # writes the figure, a PNG


class Progress(NamedTuple):
    """How far a diagnostic is."""

    done: int
    total: int
    doing: str


Run = Generator[Progress, None, Finding]


@dataclass(frozen=True)
class Diagnostic:
    """A diagnostic by name: what it runs, and the options of a quick look."""

    name: str
    function: Callable[..., Run]
    quick: Mapping[str, Any]

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    def settings(self, given: Mapping[str, Any], *, quick: bool = False) -> dict[str, Any]:
        """Give all options: the defaults, those of a quick look, those given.

        Raises
        ------
        InputError
            If there is no such option, or a value is of another kind than the default or not positive.
        """
        parameters = inspect.signature(self.function).parameters
        settings = {name: parameters[name].default for name in self.options} | (dict(self.quick) if quick else {})
        for name, value in given.items():
            if name not in settings:
                known = ", ".join(self.options)
                raise InputError(f"diagnostic '{self.name}' has no option '{name}'", mend=f"its options: {known}")
            default = settings[name]
            if isinstance(default, tuple):
                value = tuple(value) if isinstance(value, list | tuple) else (value,)
            elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            alike = {type(item) for item in default} if isinstance(default, tuple) else {type(default)}
            numbers = {int, float} if float in alike else alike
            items = value if isinstance(value, tuple) else (value,)
            if not items or any(type(item) not in numbers for item in items):
                kind = "/".join(sorted(one.__name__ for one in alike))
                raise InputError(f"option {self.name}.{name} cannot be {value!r}", mend=f"give {kind}, as {default!r}")
            if alike <= {int, float} and any(item < 0 or (item == 0 and name not in MAY_BE_ZERO) for item in items):
                raise InputError(f"option {self.name}.{name} cannot be {value!r}", mend="give a positive number")
            settings[name] = value
        return settings


def load_diagnostic(name: str) -> Diagnostic:
    """Import the diagnostic called ``name``.

    Raises
    ------
    InputError
        If there is none.
    """
    if name not in DIAGNOSTICS:
        raise InputError(f"there is no diagnostic '{name}'", mend=f"choose of {', '.join(DIAGNOSTICS)}, or all")
    module, function = DIAGNOSTICS[name].split(":")
    found = import_module(module)
    return Diagnostic(name, getattr(found, function), found.QUICK)


def finish(run: Run) -> Finding:
    """Run a diagnostic to its end and give what it found."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value
