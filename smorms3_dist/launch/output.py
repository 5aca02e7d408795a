"""Lines that ranks print: put together, shown with the rank before them, and kept in files."""

from __future__ import annotations

import collections
import datetime
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from smorms3_dist.launch.alike import AlikeTracebacks
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
    """Where the lines of all ranks go: to the terminal, which may be broken, and to files.

    If wanted each has the local time before it. Where several ranks are shown, their lines have
    the rank before them, and a traceback that several have alike is shown once.
    """

    def __init__(
        self,
        ranks: int,
        shown: Collection[int],
        directory: Path | None,
        timestamps: bool = False,
    ) -> None:
        self._timestamps = timestamps
        self._alike = AlikeTracebacks()
        self._last: set[int] = set()
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
            self._files[rank].write(self._time() + line + b"\n")
        if rank not in self._shown:
            return
        if len(self._shown) == 1:
            self._show_line(rank, line, is_error)
            return
        self._give_up(all_of_it=False)
        lines, whose = self._alike.feed((rank, is_error), line)
        if whose in self._last:
            # What the rank has said last has been shown last, if not as its own.
            self._last.add(rank)
        for each in lines:
            self._show_line(rank, each, is_error)

    def launcher_line(self, line: bytes) -> None:
        """Takes a line of mpirun or srun itself."""
        self._last.clear()
        self._show(self._time() + b"[launcher] " + line + b"\n", is_error=True)

    def tail(self, rank: int) -> list[bytes]:
        """The last lines of a rank."""
        return list(self._tails.get(rank, ()))

    def say(self, text: str) -> None:
        """Says something of the launcher's own."""
        self._give_up(all_of_it=True)
        self._last.clear()
        self._show(self._time() + b"smorms3-dist run: " + os.fsencode(text) + b"\n", is_error=True)

    def show_tail(self, rank: int) -> None:
        """Shows the last lines of a rank again, if anything has been shown after them."""
        self._give_up(all_of_it=True)
        lines = self.tail(rank)
        if not lines or rank in self._last:
            return
        self.say(f"the last lines of rank {rank}:")
        for line in lines:
            self._show(b"  | " + line + b"\n", is_error=True)

    def close(self) -> None:
        """Closes the files."""
        self._give_up(all_of_it=True)
        while self._files:
            self._files.popitem()[1].close()

    def _give_up(self, all_of_it: bool) -> None:
        for (rank, is_error), lines in self._alike.rest(all_of_it):
            for line in lines:
                self._show_line(rank, line, is_error)

    def _show_line(self, rank: int, line: bytes, is_error: bool) -> None:
        if rank not in self._last:
            self._last = {rank}
        prefix = b"" if len(self._shown) == 1 else b"[%*d] " % (self._width, rank)
        self._show(self._time() + prefix + line + b"\n", is_error)

    def _time(self) -> bytes:
        if not self._timestamps:
            return b""
        return datetime.datetime.now().isoformat(" ", "milliseconds").encode() + b" "

    def _show(self, text: bytes, is_error: bool) -> None:
        # In one piece, so that whole lines stay whole where both streams are one terminal.
        stream = sys.stderr if is_error else sys.stdout
        try:
            stream.flush()
            stream.buffer.write(text)
            stream.buffer.flush()
        except BrokenPipeError:
            self.is_broken = True
