"""The error a user can mend: one line that names the file and the mend."""

from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used; the command line prints it as one line and exits with code 2.

    Parameters
    ----------
    problem
        What is wrong, in a clause.
    mend
        What the user can do about it, in a clause.
    path
        The file it concerns.
    """

    def __init__(self, problem: str, *, mend: str = "", path: str | Path | None = None) -> None:
        self.problem, self.mend, self.path = problem, mend, Path(path) if path is not None else None
        place = f"{path}: " if path is not None else ""
        super().__init__(f"{place}{problem}" + (f"; {mend}" if mend else ""))


class InputWarning(UserWarning):
    """A file that can be used, though something about it is missing or odd."""
