"""Keep freed memory for the next tensor, on Linux with glibc."""

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT, _SINGLE = 2**31 - 1, 2**24  # bytes: what is kept at most, and from where on a tensor is given back alone


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory, so that a step does not ask the system for what the one before gave back.

    Tensors of some megabytes are freed and asked for again in every step of a sampler. By default glibc returns them to
    the system, which then hands them out page by page, cleared; what that costs a reconstruction is measured in
    ``benchmarks/how_fast_is_a_step.py``. Tensors of 16 MB and more are still given back, so that the most that a
    process needs hardly grows. Settings of one's own (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``) are left.

    The command line does this as it starts; a program that uses msmri as a library may, before its first tensor.

    Returns
    -------
    bool
        Whether it was done: not where there is no glibc.
    """
    if not sys.platform.startswith("linux") or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all([mallopt(_MMAP_THRESHOLD, _SINGLE), mallopt(_TRIM_THRESHOLD, _KEPT)])
    return False
