"""Tracebacks that several ranks print alike: the first one's is shown, and of the others a line."""

from __future__ import annotations

import time
from collections.abc import Iterator

_FIRST = b"Traceback (most recent call last):"
_PATIENCE_S = 1.0
"""How long a traceback may take from its first line to its last."""

_Stream = tuple[int, bool]
"""What prints: a rank, and whether to stderr."""


class AlikeTracebacks:
    """Keeps the lines of a traceback back until it is whole, which is a moment later."""

    def __init__(self) -> None:
        self._parts: dict[_Stream, list[bytes]] = {}
        self._began: dict[_Stream, float] = {}
        self._whose: dict[tuple[bytes, ...], int] = {}

    def feed(self, stream: _Stream, line: bytes) -> tuple[list[bytes], int | None]:
        """Takes a line.

        Returns:
            The lines to show, and the rank that has shown a traceback like the one that has ended
            with this line.
        """
        parts = self._parts.get(stream)
        if parts is None:
            if line != _FIRST:
                return [line], None
            self._parts[stream], self._began[stream] = [line], time.monotonic()
            return [], None
        parts.append(line)
        if line.startswith(b" "):
            return [], None
        del self._parts[stream]
        whose = self._whose.setdefault(tuple(parts), stream[0])
        if whose == stream[0]:
            return parts, None
        return [b"the same traceback as that of rank %d: " % whose + line], whose

    def rest(self, all_of_it: bool) -> Iterator[tuple[_Stream, list[bytes]]]:
        """Gives up what has not become whole: all of it, or what has not for long."""
        for stream in [*self._parts]:
            if all_of_it or time.monotonic() - self._began[stream] > _PATIENCE_S:
                yield stream, self._parts.pop(stream)
