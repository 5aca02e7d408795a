"""The launcher's own stdout and stderr: pieces of output of many ranks, on one terminal."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Hashable


class Terminal:
    """Shows pieces of output, each a line or a part of one.

    Where a line is not at its end and somebody else prints, it gets one: lines of two never mix.

    Attributes:
        trouble: Which stream could first not be written, and why.
    """

    def __init__(self) -> None:
        self.trouble: tuple[str, OSError] | None = None
        self._open: tuple[Hashable, bool] | None = None
        self._returned = False

    def show(
        self, source: Hashable, prefix: bytes, text: bytes, end: bytes, is_error: bool
    ) -> None:
        r"""Shows a piece of output of some source, with a prefix where a line begins.

        Its end is that of a line, b"\r" where the next piece takes its place, or none.
        """
        if self._open == (source, is_error):
            head = prefix if self._returned and text else b""
        elif not text and end == b"\r":
            return
        else:
            self.end_line()
            head = prefix
        # In one piece, so that whole lines stay whole where both streams are one terminal.
        self._write(head + text + end, is_error)
        self._open = None if end.endswith(b"\n") else (source, is_error)
        self._returned = end == b"\r"

    def end_line(self) -> None:
        """Ends the line that has no end yet, if there is one."""
        if self._open is not None:
            self._write(b"\n", self._open[1])
            self._open = None

    def _write(self, text: bytes, is_error: bool) -> None:
        stream = sys.stderr if is_error else sys.stdout
        left = memoryview(text)
        try:
            stream.flush()
            while left:
                try:
                    left = left[os.write(stream.fileno(), left) :]
                except BlockingIOError:
                    select.select([], [stream], [])
        except OSError as error:
            self.trouble = self.trouble or ("stderr" if is_error else "stdout", error)
            # Nothing more is to be written to it, when Python ends, say.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
