"""What happens to a job, as JSON lines in a file (``--events``)."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist.version import __version__

_BEGINNING = b'{"time": '
_LONGEST_BYTES = 1 << 20

_PACKAGES = ("chainer", "numpy", "mpi4py")


def versions() -> dict[str, str]:
    """The versions of what a job is made of, as far as it is installed; nothing is imported."""
    # Not before: few jobs note events.
    import platform
    from importlib import metadata

    found = {"smorms3_dist": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class EventLog:
    """Appends a line for each event, whole or not at all.

    Args:
        path: The file; ``None`` to note nothing. An `OSError` says why it cannot be written.
        say: Is told, once, if a line could not be written; the job goes on.

    Attributes:
        attempt: The number of the attempt, from 0, which each line has.
    """

    def __init__(
        self, path: Path | None = None, say: Callable[[str], object] = lambda text: None
    ) -> None:
        self._path = path
        self._say = say
        self._file: int | None = None
        self.attempt = 0
        if path is None:
            return
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._is_regular = stat.S_ISREG(os.fstat(self._file).st_mode)
        if self._is_regular:
            self._end_last_line()

    def _end_last_line(self) -> None:
        """Removes a line of which a part is missing, where a machine has gone down meanwhile."""
        assert self._file is not None
        size = self._size()
        end = os.pread(self._file, _LONGEST_BYTES, max(0, size - _LONGEST_BYTES))
        piece = end.rpartition(b"\n")[2]
        if piece.startswith(_BEGINNING):
            os.ftruncate(self._file, size - len(piece))
        elif piece:
            self._write(b"\n")

    def note(self, event: str, **facts: Any) -> None:
        """Notes an event that happens now, with what belongs to it."""
        line = {"time": time.time(), "event": event, "attempt": self.attempt, **facts}
        self._write(json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Closes the file. It may be called again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _size(self) -> int:
        assert self._file is not None
        return os.fstat(self._file).st_size if self._is_regular else 0

    def _write(self, line: bytes) -> None:
        if self._file is None:
            return
        size, written = self._size(), 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            if written and self._is_regular:
                os.ftruncate(self._file, size)
            self._say(f"--events {self._path}: {error.strerror}; nothing more is noted there")
            self.close()
