"""A modality is an operator and a reader: methods, samplers, models and training know no word for one."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "msmri"
FILES = [
    ROOT / "train.py",
    *(path for part in ("sampling", "model", "methods") for path in sorted((ROOT / part).rglob("*.py"))),
]
WORDS = {"face", "faces", "ffhq", "photo", "photos", "photograph", "photographs", "mri", "fastmri"}


def told(source: str) -> list[str]:
    """Words of a modality outside docstrings, references (BibTeX), and the name of sigpy's module."""
    found = []
    last = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        words = set(re.findall(r"[a-z]+", token.string.lower())) & WORDS
        docstring = token.type == tokenize.STRING and token.string.startswith(('"""', 'r"""'))
        if words and not docstring and last != "sigpy.":
            found.append(f"{token.start[0]}: {token.string.strip()[:60]}")
        last = last + token.string if token.string == "." else token.string
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_word_of_a_modality(path):
    assert not told(path.read_text("utf-8"))


def test_the_check_sees_them():
    assert told("FFHQ_128 = 1\n") and told("if kind == 'photos':\n    pass\n") and told("x = 1  # of MRI\n")
    assert not told('"""Of MRI and faces."""\nimport msmri\nsigpy.mri.linop.Sense(surface)\n')
