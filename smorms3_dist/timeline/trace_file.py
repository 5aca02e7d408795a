"""A file of trace events, in the form of a JSON array, that is whole after each write.

Each write puts its events where the array ended, and ends it again. A process that is killed
leaves all that it has written; a host that crashes may leave a torn line at the end, which is left
out by whoever reads the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_BEGIN, _BETWEEN, _END = b"[\n", b",\n", b"\n]\n"

LARGEST = 64 << 20
"""Bytes of a file, after which another one is begun. So many of the last events are kept at least,
and twice as many at most."""


class TraceFile:
    """Appends events to a file.

    Args:
        path: The file, which `read_events` reads.
        goes_on: Whether events that are there already are kept.
        largest: Bytes after which it becomes the one before, and another is begun.

    Raises:
        OSError: If it cannot be written to; so may `write`.
    """

    def __init__(self, path: Path, goes_on: bool = False, largest: int = LARGEST) -> None:
        self._path = path
        self._largest = largest
        there = _read(path) if goes_on else []
        if not goes_on:
            before(path).unlink(missing_ok=True)
        self._begin()
        if there:
            self.write(json.dumps(event) for event in there)

    def _begin(self) -> None:
        self._file = io.FileIO(self._path, "w")
        self._file.write(_BEGIN + _END.lstrip())
        self._is_empty = True

    def write(self, events: Iterable[str]) -> None:
        """Appends events, each a JSON object without a newline; in one piece."""
        text = _BETWEEN.join(event.encode() for event in events)
        if not text:
            return
        if self._is_empty:
            self._file.seek(len(_BEGIN))
            self._file.write(text + _END)
            self._is_empty = False
            return
        self._file.seek(-len(_END), os.SEEK_END)
        self._file.write(_BETWEEN + text + _END)

    @property
    def is_full(self) -> bool:
        """Whether another file should be begun."""
        return self._file.tell() > self._largest

    def begin_another(self) -> None:
        """Keeps what there is as the file before, whose own are given up."""
        self._file.close()
        os.replace(self._path, before(self._path))
        self._begin()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def before(path: Path) -> Path:
    """The name of the file before a file."""
    return path.with_suffix(f".before{path.suffix}")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file, and of the one before it, without what is torn or no event."""
    return _read(before(path)) + _read(path)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line.removesuffix(","))
            if isinstance(event, dict) and "ph" in event:
                found.append(event)
    return found
