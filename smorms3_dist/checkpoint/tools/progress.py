"""How far long work has come: counted in bytes, and shown on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

Progress = Callable[[int, int], Any]
"""Is called with the number of bytes that have been done, and with how many there are."""


class Meter:
    """Counts bytes."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done = 0
        self._total = total
        self._progress = progress

    def add(self, nbytes: int) -> None:
        """Counts some that have been done."""
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


class Line:
    """A line that says how far something has come, and is written over as it goes on.

    On what is no terminal, it is a new line each time, and one for each tenth of the whole.
    """

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._stream = stream
        self._terminal = stream.isatty()
        self._shown = ""

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._terminal and self._shown:
            self._stream.write("\r" + " " * len(self._shown) + "\r")
            self._stream.flush()

    def __call__(self, done: int, total: int) -> None:
        """Shows it, if it has changed enough."""
        share = done / total if total else 1.0
        percent = f"{share:.1%}" if self._terminal else f"{int(share * 10) * 10}%"
        if not self._shown.startswith(f"{self._what}: {percent} "):
            line = f"{self._what}: {percent} ({size_text(done)} of {size_text(total)})"
            padding = " " * (len(self._shown) - len(line))
            self._stream.write(f"\r{line}{padding}" if self._terminal else f"{line}\n")
            self._stream.flush()
            self._shown = line


def size_text(nbytes: int) -> str:
    """A number of bytes for people: ``12.3 MB``."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value = nbytes / 1000
    for unit in ("kB", "MB", "GB", "TB"):
        if value < 999.95:
            return f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} PB"
