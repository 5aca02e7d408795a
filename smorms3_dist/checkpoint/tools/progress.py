"""How far long work has come: counted in bytes, and shown on a terminal."""

from __future__ import annotations

import time
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
    """A line that says how far something has come, how fast, and how long it will still take.

    It is written over as that goes on. On what is no terminal, it is a new line each time, and one
    for each tenth of the whole.
    """

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._stream = stream
        self._terminal = stream.isatty()
        self._shown = ""
        self._start = time.monotonic()

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
            pace = self._pace(done, total)
            line = f"{self._what}: {percent} ({size_text(done)} of {size_text(total)}{pace})"
            padding = " " * (len(self._shown) - len(line))
            self._stream.write(f"\r{line}{padding}" if self._terminal else f"{line}\n")
            self._stream.flush()
            self._shown = line

    def _pace(self, done: int, total: int) -> str:
        seconds = time.monotonic() - self._start
        if not done or seconds <= 0:
            return ""
        rate = done / seconds
        left = f", {duration_text((total - done) / rate)} left" if done < total else ""
        return f", {size_text(int(rate))}/s{left}"


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


def duration_text(seconds: float) -> str:
    """A duration for people: ``7 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = max(round(seconds), 1)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
