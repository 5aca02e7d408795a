"""Lines that ranks print: put together, shown with the rank before them, and kept in files."""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from smorms3_dist.launch.wire import MAX_LINE_BYTES

TAIL_LINES = 40
"""How many of a rank's last lines are shown again if it fails."""

_SHOWN_BYTES = 2000


class Lines:
    """Makes lines of pieces of them."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Takes what was read; gives the lines that are whole now, without their ends."""
        self._rest += data
        start = 0
        while True:
            end = self._rest.find(b"\n", start)
            if (end if end >= 0 else len(self._rest)) - start > MAX_LINE_BYTES:
                end = start + MAX_LINE_BYTES
                yield bytes(self._rest[start:end])
                start = end
            elif end < 0:
                break
            else:
                yield bytes(self._rest[start:end])
                start = end + 1
        del self._rest[:start]

    def rest(self) -> bytes:
        """What came after the last end of a line."""
        rest, self._rest = bytes(self._rest), bytearray()
        return rest


class Output:
    """Where the lines of all ranks go: to the terminal, which may be broken, and to files."""

    def __init__(self, ranks: int, shown: Collection[int], directory: Path | None) -> None:
        self._width = len(str(ranks - 1))
        self._shown = shown
        self._directory = directory
        self._files: dict[int, BinaryIO] = {}
        self._tails: dict[int, collections.deque[bytes]] = {}
        self.is_broken = False
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def line(self, rank: int, line: bytes, is_error: bool) -> None:
        """Takes a line that a rank has printed; an `OSError` is of the rank's file."""
        tail = self._tails.setdefault(rank, collections.deque(maxlen=TAIL_LINES))
        tail.append(line[:_SHOWN_BYTES])
        if self._directory is not None:
            if rank not in self._files:
                path = self._directory / f"rank-{rank:0{max(self._width, 2)}d}.log"
                self._files[rank] = open(path, "ab", buffering=0)  # noqa: SIM115
            self._files[rank].write(line + b"\n")
        if rank in self._shown:
            self._show(b"[%*d] " % (self._width, rank) + line + b"\n", is_error)

    def launcher_line(self, line: bytes) -> None:
        """Takes a line of mpirun or srun itself."""
        self._show(b"[launcher] " + line + b"\n", is_error=True)

    def tail(self, rank: int) -> list[bytes]:
        """The last lines of a rank."""
        return list(self._tails.get(rank, ()))

    def say(self, text: str) -> None:
        """Says something of the launcher's own."""
        self._show(b"smorms3-dist run: " + os.fsencode(text) + b"\n", is_error=True)

    def show_tail(self, rank: int) -> None:
        """Shows the last lines of a rank again."""
        for line in self.tail(rank):
            self._show(b"  | " + line + b"\n", is_error=True)

    def close(self) -> None:
        """Closes the files."""
        while self._files:
            self._files.popitem()[1].close()

    def _show(self, text: bytes, is_error: bool) -> None:
        # In one piece, so that whole lines stay whole where both streams are one terminal.
        stream = sys.stderr if is_error else sys.stdout
        try:
            stream.flush()
            stream.buffer.write(text)
            stream.buffer.flush()
        except BrokenPipeError:
            self.is_broken = True
