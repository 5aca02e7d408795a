"""glibc's malloc, told to keep freed memory for the next step.

A step allocates activations and gradients, and frees them. glibc gives what lies at the top of the
heap back to the system at once, and larger arrays as well, so that the next step faults them in
again, page by page: thousands of faults, up to a fifth of a step. Arrays beyond 32 MiB still go
back: pieces of them would be given to small ones, and the next large ones find no place.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping

# Numbers of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}

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
