"""Host memory that several processes of one host have in common.

One of them makes a file that has no name and lies in memory alone, and the others open it through
what /proc shows of that process. Unlike /dev/shm it has no limit of its own, and it is gone with
the last process that has it, however that ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from smorms3_dist.device.memory import PARAMETERS, offset_of

import numpy as np

_ALIGNED = 1 << 21
"""Bytes: each array begins with a huge page of the file, where the system has such."""

_TOKEN_BYTES = 16


class SharedFile(NamedTuple):
    """A file in memory, as the process that has made it tells others of it.

    Attributes:
        path: Where they find it.
        token: What it begins with: another process of that number has another file.
    """

    path: str
    token: bytes


class Offer:
    """A file in memory for arrays of some sizes, which others can open until `close`.

    Args:
        sizes: Bytes of each array.

    Attributes:
        file: What others have to be told.

    Raises:
        OSError: If the system has no such files, or none so large.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memfd_create")
        self._descriptor = os.memfd_create("smorms3_dist", os.MFD_CLOEXEC)
        token = secrets.token_bytes(_TOKEN_BYTES)
        self.file = SharedFile(f"/proc/{os.getpid()}/fd/{self._descriptor}", token)
        try:
            os.ftruncate(self._descriptor, _starts(sizes)[-1])
            os.pwrite(self._descriptor, token, 0)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Lets nobody open it any more; arrays that there are stay."""
        os.close(self._descriptor)


def map_arrays(file: SharedFile, sizes: Sequence[int]) -> list[np.ndarray]:
    """Maps the arrays of a file: zeros, until somebody writes to them.

    They start at the place of parameters within a page: see `smorms3_dist.device.memory`.

    Args:
        file: What its maker has told.
        sizes: As of the `Offer`.

    Returns:
        uint8 arrays of these sizes. Whoever else maps the file sees what is written to them.

    Raises:
        OSError: If it cannot be opened or mapped, or is another file.
    """
    descriptor = os.open(file.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(descriptor, _TOKEN_BYTES, 0) != file.token:
            raise OSError(f"{file.path} is of another process: they do not see the same ones")
        starts = _starts(sizes)[:-1]
        return [_map(descriptor, *each) for each in zip(starts, sizes, strict=True)]
    finally:
        os.close(descriptor)


def _map(descriptor: int, start: int, nbytes: int) -> np.ndarray:
    place = offset_of(PARAMETERS)
    mapping = mmap.mmap(descriptor, place + nbytes, offset=start)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # As NumPy does with its own memory; kernels may have none.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)[place:]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each array's part of the file starts, and the file ends."""
    starts = [_ALIGNED]
    for nbytes in sizes:
        end = starts[-1] + offset_of(PARAMETERS) + nbytes
        starts.append(-(-end // _ALIGNED) * _ALIGNED)
    return starts
