import os
import subprocess
import sys
from pathlib import Path

import pytest

from msmri import allocation

ROOT = Path(__file__).parents[1]
CODE = """
import resource, sys
import numpy as np
from msmri.allocation import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
for turn in range(60):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(2**20) for _ in range(3)]  # 8 MB each
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def has_glibc():
    try:
        return sys.platform.startswith("linux") and bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (ValueError, OSError):
        return False


def faults(keep):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["PYTHONPATH"] = str(ROOT)
    told = subprocess.run(
        [sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, env=environment, check=True
    )
    return int(told.stdout)


@pytest.mark.skipif(not has_glibc(), reason="glibc alone is told")
def test_freed_memory_is_not_asked_for_again():
    assert faults(keep=True) < 500 < 20_000 < faults(keep=False)


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_settings_of_ones_own_are_left(monkeypatch, name):
    monkeypatch.setenv(name, "131072")
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: pytest.fail("glibc was told"))
    assert not allocation.keep_freed_memory()


def test_without_glibc_nothing_is_done(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: object())
    assert not allocation.keep_freed_memory()
    monkeypatch.setattr(allocation.sys, "platform", "darwin")
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: pytest.fail("looked for glibc"))
    assert not allocation.keep_freed_memory()


def test_the_command_line_keeps_it(monkeypatch):
    import msmri.cli

    called = []
    monkeypatch.setattr(msmri.cli, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(msmri.cli, "app", lambda: called.append("run"))
    msmri.cli.main()
    assert called == ["kept", "run"]
