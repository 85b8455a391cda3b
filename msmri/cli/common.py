"""What the commands share: options, errors as one line, progress, and how options become objects."""

import functools
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msmri.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from msmri.physics.masks import MaskLaw
    from msmri.tensors import Mask

MISTAKE, INTERRUPTED = 2, 130  # exit codes

Inputs = Annotated[
    list[Path], typer.Argument(metavar="INPUT...", help=".h5 files of fastMRI's layout, or directories.")
]
MaskOption = Annotated[
    str | None,
    typer.Option("--mask", help="Undersample fully sampled input: a law (see msmri mask --help), or a .npy file."),
]
Acceleration = Annotated[float, typer.Option("--acceleration", "-R", help="Nominal acceleration of the mask.")]
CenterLines = Annotated[int | None, typer.Option(help="Full central lines of the mask; 20 of 256 without it.")]
Seed = Annotated[int, typer.Option(help="Seed of masks and samples, together with each slice's name.")]
MaskPer = Annotated[str, typer.Option(help="Draw one mask a 'slice', or one a 'file' as fastMRI does.")]
Sets = Annotated[str, typer.Option(help="Sets of coil maps: 1, 2, or auto (2 where the image is folded).")]
CropTo = Annotated[int | None, typer.Option(help="Crop k-space to N x N: a quick trial at low resolution.")]
Coils = Annotated[int | None, typer.Option(help="Compress to N virtual coils.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Slices = Annotated[str | None, typer.Option(help="Which slices: 3, 0:5 or 0,2,4; all without it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the input, say what would be done, and stop.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show full tracebacks.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        debug = bool(options.get("debug"))
        try:
            with shown_warnings(debug):
                command(*args, **options)
        except InputError as error:
            if debug:
                traceback.print_exc()
            complain(str(error))
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            complain("interrupted", kind="msmri")
            raise typer.Exit(INTERRUPTED) from None

    return run


def one_line(error: BaseException, path: Path | None = None) -> str:
    """Say an error in one line that names the file."""
    text = " ".join(str(error).split())
    if not isinstance(error, InputError):
        text = f"{type(error).__name__}: {text} (a defect of msmri or of a method? --debug shows where)"
    return text if path is None or str(path) in text else f"{path}: {text}"


def complain(text: str, *, kind: str = "error") -> None:
    """Write one line to stderr, above a progress bar if there is one."""
    errors = _console()
    errors.print(f"{kind}: {' '.join(text.split())}", markup=False, highlight=False, soft_wrap=True, style=None)


@functools.cache
def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def shown_warnings(debug: bool) -> Iterator[None]:
    """Show each warning of msmri once, as one line; those of other packages only when debugging."""
    seen: set[str] = set()

    def show(message: Any, category: type[Warning], filename: str, *_: Any) -> None:
        text = str(message)
        ours = category.__module__.startswith("msmri") or "msmri" in Path(filename).parts
        if text not in seen and (debug or (ours and issubclass(category, UserWarning))):
            seen.add(text)
            complain(text, kind="warning")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def progress_bar() -> "Iterator[Progress]":
    """Show progress on stderr, where that is a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    errors = _console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=errors, disable=not errors.is_terminal) as bar:
        yield bar


def find_device(name: str) -> str:
    """Check a device, and choose one for ``auto``."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise InputError(f"there is no device '{name}'", mend="give cpu, cuda, cuda:1 or auto") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device can be used here", mend="give --device cpu or auto")
    return name


def find_law(name: str | None, acceleration: float, center_lines: int | None) -> "MaskLaw | Mask | None":
    """Make the mask law of ``--mask``, or read the mask from a .npy file."""
    from msmri.physics.masks import law_from_name

    if name is None:
        return None
    if not name.endswith(".npy"):
        if center_lines is not None and name.startswith("fastmri-"):
            raise InputError(f"mask law {name} has no --center-lines", mend="leave it out, or use random-lines")
        return law_from_name(name, acceleration=acceleration, centre_lines=center_lines)
    import numpy as np
    import torch

    try:
        values = np.load(name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError("is not a readable .npy mask", mend="make one with msmri mask -o", path=name) from error
    if values.dtype.kind not in "biuf" or values.ndim < 1 or not np.isin(values, (0, 1)).all():
        raise InputError("is not a mask of 0 and 1", mend="make one with msmri mask -o", path=name)
    values = np.squeeze(values)
    if values.ndim not in (1, 2):
        raise InputError(f"holds a mask of shape {values.shape}", mend="give (kx,) or (ky, kx)", path=name)
    return torch.from_numpy(values.astype(bool).reshape(1, 1, -1, values.shape[-1]))


def find_sets(text: str) -> Any:
    """Read ``--sets``."""
    if text not in ("1", "2", "auto"):
        raise InputError(f"--sets {text} is not 1, 2 or auto")
    return text if text == "auto" else int(text)


def find_slices(text: str | None) -> slice | list[int] | None:
    """Read ``--slices``: ``3``, ``0:5``, ``0,2,4``."""
    if text is None:
        return None
    if re.fullmatch(r"\d*:\d*(:[1-9]\d*)?", text):
        return slice(*(int(part) if part else None for part in text.split(":")))
    if re.fullmatch(r"\d+(,\d+)*", text):
        return [int(part) for part in text.split(",")]
    raise InputError(f"cannot read --slices {text}", mend="give 3, 0:5 or 0,2,4")


def at_least(value: int | None, least: int, option: str) -> int | None:
    """Refuse a number that is too small to make sense."""
    if value is not None and value < least:
        raise InputError(f"{option} {value} is too small", mend=f"give {least} or more")
    return value
