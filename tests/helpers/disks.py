"""Disks that have no space left, or fail, for tests of saves."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def mounting(path: Path, commands: str = "true") -> list[str]:
    """A command line that runs commands of a shell with a disk of 1 MB at a path.

    Nobody else sees the disk, and no rights are needed, where the system lets users have
    namespaces; otherwise the command line fails at once.
    """
    script = f"set -e; mount -t tmpfs -o size=1m none {shlex.quote(str(path))}; {commands}"
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]


def can_be_mounted() -> bool:
    """Whether `mounting` works here."""
    with tempfile.TemporaryDirectory() as path:
        return (
            subprocess.run(mounting(Path(path)), capture_output=True, check=False).returncode == 0
        )


def fill(place: Path, free: int) -> None:
    """Fills the disk of a directory but for some bytes, by a file there named ``filler``."""
    found = os.statvfs(place)
    (place / "filler").write_bytes(bytes(found.f_bavail * found.f_frsize - free))


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """No file of this process can get larger: more is refused, as by a full disk."""
    # Python ignores the signal that comes with it.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def failing(call: str, pattern: str) -> Iterator[None]:
    """Lets calls of this process fail, as a broken disk does.

    Args:
        call: The function of `os`, of a path or a descriptor.
        pattern: Of the path, to its end, with which the call fails.
    """
    function = getattr(os, call)

    def broken(what: Any, *more: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
        if re.search(f"{pattern}$", path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return function(what, *more)

    setattr(os, call, broken)
    try:
        yield
    finally:
        setattr(os, call, function)
