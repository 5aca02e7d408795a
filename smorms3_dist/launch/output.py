"""Lines that ranks print: put together, shown with the rank before them, and kept in files."""

from __future__ import annotations

import collections
import datetime
import itertools
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from smorms3_dist.launch.alike import AlikeTracebacks
from smorms3_dist.launch.terminal import Terminal
from smorms3_dist.launch.wire import MAX_LINE_BYTES

TAIL_LINES = 40
"""How many of a rank's last lines are shown again if it fails."""

_SHOWN_BYTES = 2000

_NEAR = 10
"""Last lines are not shown again if fewer lines than these have been shown after them."""


class Lines:
    r"""Makes lines of pieces of them.

    A line ends with b"\n", or with b"\r", by which progress bars are drawn over themselves.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._is_open = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Takes what was read; gives the lines that are whole now, with their ends."""
        lines = (self._rest + data).splitlines(keepends=True)
        # What b"\r" means is known when something follows it.
        self._rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
        for line in lines:
            yield from self._cut(line)
        *cut, self._rest = self._cut(self._rest)
        yield from cut
        if lines or cut:
            self._is_open = not (cut or lines)[-1].endswith(b"\n")

    @staticmethod
    def _cut(line: bytes) -> Iterator[bytes]:
        while len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
            yield line[:MAX_LINE_BYTES] + b"\n"
            line = line[MAX_LINE_BYTES:]
        yield line

    @property
    def is_waiting(self) -> bool:
        """Whether a line has begun that was not given yet."""
        return bool(self._rest)

    def unfinished(self) -> bytes:
        """Gives the beginning of a line; what follows is given without it."""
        rest, self._rest, self._is_open = self._rest, b"", True
        return rest

    def end(self) -> bytes:
        """Gives what came after the last end of a line, with an end; or nothing."""
        rest, self._rest = self._rest, b""
        return rest + b"\n" if rest or self._is_open else b""


def new_directory(parent: Path) -> Path:
    """Makes a directory for the output of a run, named by the time; never one that is there.

    An `OSError` says why it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError


def divided(piece: bytes) -> tuple[bytes, bytes]:
    """A piece of output and its end, which may be missing."""
    line = piece.rstrip(b"\r\n")
    return line, piece[len(line) :]


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
        self._lines = 0
        self._shown_at: dict[int, int] = {}
        self._width = len(str(ranks - 1))
        self._shown = shown
        self._directory = directory
        self._files: dict[int, BinaryIO] = {}
        self._begins: dict[int, bool] = {}
        # Lines, and whether each was printed to stderr.
        self._tails: dict[int, collections.deque[tuple[bytes, bool]]] = {}
        self._ends: dict[int, tuple[bool, bytes]] = {}
        self._terminal = Terminal()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    @property
    def trouble(self) -> tuple[str, OSError] | None:
        """Which stream of the terminal could first not be written, and why."""
        return self._terminal.trouble

    def piece(self, rank: int, piece: bytes, is_error: bool) -> None:
        """Takes what a rank has printed, see `Lines`; an `OSError` is of the rank's file."""
        line, end = divided(piece)
        self._keep(rank, line, end, is_error)
        if self._directory is not None:
            if rank not in self._files:
                path = self._directory / f"rank-{rank:0{max(self._width, 2)}d}.log"
                self._files[rank] = open(path, "ab", buffering=0)  # noqa: SIM115
                self._begins[rank] = True
            time = self._time() if self._begins[rank] and line else b""
            self._files[rank].write(time + piece)
            self._begins[rank] = end != b""
        if rank not in self._shown:
            return
        if len(self._shown) == 1:
            self._show(rank, line, end, is_error)
            return
        if not end.endswith(b"\n"):
            self._give_up(all_of_it=True)
            self._show(rank, line, end, is_error)
            return
        self._give_up(all_of_it=False)
        lines, whose = self._alike.feed((rank, is_error), line)
        for each in lines:
            self._show(rank, each, end, is_error)
        if whose is not None:
            self._shown_at[rank] = self._shown_at.get(whose, 0)

    def _keep(self, rank: int, line: bytes, end: bytes, is_error: bool) -> None:
        """Keeps the last lines; of those that are drawn over each other, the last one."""
        tail = self._tails.setdefault(rank, collections.deque(maxlen=TAIL_LINES))
        before_is_error, before = self._ends.get(rank, (is_error, b"\n"))
        self._ends[rank] = is_error, end
        goes_on = tail and before_is_error == is_error and not before.endswith(b"\n")
        if goes_on and before == b"":
            line = tail.pop()[0] + line
        elif goes_on and line:
            tail.pop()
        elif goes_on or not (line or end.endswith(b"\n")):
            return
        tail.append((line[:_SHOWN_BYTES], is_error))

    def launcher_line(self, line: bytes) -> None:
        """Takes a line of mpirun or srun itself."""
        self._own(b"[launcher] " + line)

    def tail(self, rank: int) -> list[bytes]:
        """The last lines of a rank."""
        return [line for line, _ in self._tails.get(rank, ())]

    def last_words(self, rank: int) -> list[bytes]:
        """Those of its last lines that went to stderr, if any did, as tracebacks do; else all.

        What went to stdout comes before or after it as chance has it, or time: both are read from
        pipes, and a line without an end is taken when the rest of it does not come, or at the end.
        """
        tail = self._tails.get(rank, ())
        return [line for line, is_error in tail if is_error] or self.tail(rank)

    def say(self, text: str) -> None:
        """Says something of the launcher's own."""
        self._give_up(all_of_it=True)
        self._own(b"smorms3-dist run: " + os.fsencode(text))

    def show_tail(self, rank: int) -> None:
        """Shows the last lines of a rank again, if others have come after them."""
        self._give_up(all_of_it=True)
        lines = self.tail(rank)
        shown_at = self._shown_at.get(rank, -_NEAR)
        if not lines or self._lines - shown_at < _NEAR:
            return
        self.say(f"the last lines of rank {rank}:")
        for line in lines:
            self._terminal.show("launcher", b"", b"  | " + line, b"\n", is_error=True)

    def close(self) -> None:
        """Ends the last line, and closes the files."""
        self._give_up(all_of_it=True)
        self._terminal.end_line()
        while self._files:
            self._files.popitem()[1].close()

    def _own(self, line: bytes) -> None:
        self._lines += 1
        self._terminal.show("launcher", self._time(), line, b"\n", is_error=True)

    def _show(self, rank: int, line: bytes, end: bytes, is_error: bool) -> None:
        self._lines += end.endswith(b"\n")
        self._shown_at[rank] = self._lines
        prefix = b"" if len(self._shown) == 1 else b"[%*d] " % (self._width, rank)
        self._terminal.show(rank, self._time() + prefix, line, end, is_error)

    def _give_up(self, all_of_it: bool) -> None:
        """Shows what has begun as a traceback, and has not become one."""
        for (rank, is_error), lines in self._alike.rest(all_of_it):
            for line in lines:
                self._show(rank, line, b"\n", is_error)

    def _time(self) -> bytes:
        if not self._timestamps:
            return b""
        return datetime.datetime.now().isoformat(" ", "milliseconds").encode() + b" "
