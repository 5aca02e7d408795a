"""glibc's malloc, told to keep freed memory for the next step.

A step allocates activations and gradients, and frees them. Large ones glibc gives back to the
system at once, and what lies at the top of the heap as well, so that the next step faults it in
again, page by page: thousands of faults, up to a fifth of a step. What is kept is what the process
has needed anyway at its peak.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping

# Numbers of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SETTINGS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}

_OF_GLIBC = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@functools.cache
def keep_freed_memory() -> str:
    """Tells malloc, once in a process; returns what was done, in words.

    ``SMORMS3_MALLOC=0`` leaves malloc as it is, and so do the variables of glibc for these settings
    and malloc libraries without ``mallopt``.
    """
    reason = _reason_against(os.environ)
    if reason:
        return f"malloc is left as it is: {reason}"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "malloc is left as it is: it is not glibc's"
    # All of them, whatever a malloc library that takes the place of glibc's answers.
    if all([mallopt(*setting) for setting in _SETTINGS.items()]):
        return "malloc keeps freed memory for the next step"
    return "malloc is left as it is: it refuses mallopt"


def _reason_against(environment: Mapping[str, str]) -> str:
    """Who has decided otherwise; empty if nobody has."""
    if environment.get("SMORMS3_MALLOC") == "0":
        return "SMORMS3_MALLOC=0"
    for name in _OF_GLIBC:
        if name in environment:
            return f"{name} is set"
    return "GLIBC_TUNABLES" if "glibc.malloc." in environment.get("GLIBC_TUNABLES", "") else ""
