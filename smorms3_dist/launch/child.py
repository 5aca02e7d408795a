"""A child process within an event loop.

asyncio's own waits, in some versions of Python, until nobody holds the pipes of a child any more,
and so for everything that the child has left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from smorms3_dist.launch.output import Lines

_PIECE_BYTES = 1 << 16

_UNFINISHED_S = 1.0
"""How long the beginning of a line waits for the rest of it, until it is shown."""

_KEEPER = (
    'trap "" HUP INT TERM; '
    'read -r group && { read -r over || { rm -rf "$1"; kill -KILL "-$group"; }; }'
)
"""Removes a directory, and kills a process group that it has read, if then its input ends without a
second line."""


def members(session: int) -> list[int]:
    """The processes of a session that run, in whatever groups."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            # The name, in parentheses, may have anything in it.
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX" and int(fields[3]) == session:
                found.append(int(stat.parent.name))
    return found


def signal_name(number: int) -> str:
    """What a signal is called."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def heed(handlers: Mapping[int, Callable[[], object]]) -> None:
    """Lets the running event loop handle signals; those that are ignored stay so (``nohup``)."""
    for number, handler in handlers.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, handler)


class _PipeReader(asyncio.StreamReader):
    """Knows how many of the bytes that have been read are still to be taken."""

    untaken = 0

    def feed_data(self, data: Any) -> None:
        self.untaken += len(data)
        super().feed_data(data)


def _unread(pipe: IO[bytes]) -> int:
    """How many bytes there are to be read from a pipe."""
    if pipe.closed:
        return 0
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


class Keeper:
    """Ends a process group when this process ends without having done so, however that comes.

    It is a process in a session of its own: what ends this one and its group does not end it.

    Args:
        directory: What it removes then.
    """

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "keeper", directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )

    def watch(self, group: int) -> None:
        """Names the group."""
        self._say(f"{group}")

    def release(self) -> None:
        """Says that the group has been ended, or never was, and waits for the keeper."""
        self._say("over")
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it
            self._process.stdin.write(f"{word}\n".encode())


class Child:
    """A child process that leads a process group. To be made within a running event loop.

    It calls `prepare` before the command. There is nothing to read in its stdin. With a session of
    its own it has no terminal.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        prepare: Callable[[], None] | None = None,
        new_session: bool = False,
    ) -> None:
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=prepare,
            start_new_session=new_session,
            # MPICH's mpirun hands ranks an open file. Python's own are closed anyway.
            close_fds=False,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None and self._process.stderr is not None
        self._pipes = (self._process.stdout, _PipeReader()), (self._process.stderr, _PipeReader())
        self.ended = asyncio.Event()
        self.ended_at: float | None = None
        self._waiting = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        # In a thread: other ways are Linux's alone, and not every one's.
        await asyncio.get_running_loop().run_in_executor(None, self._process.wait)
        self.ended_at = time.monotonic()
        self.ended.set()

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; ``None`` as long as it runs."""
        return self._process.returncode if self.ended.is_set() else None

    def words(self) -> set[str]:
        """The arguments of what it has started in its session: of ssh, say, the host."""
        found: set[str] = set()
        for pid in self._session():
            with contextlib.suppress(OSError):  # it has just ended
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found.update(map(os.fsdecode, words))
        return found

    def kill_session(self) -> None:
        """Kills what it has started in its session, in whatever groups."""
        for pid in self._session():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _session(self) -> list[int]:
        return [pid for pid in members(self.pid) if pid != self.pid]

    async def wait(self, limit: float) -> bool:
        """Waits for so many seconds at most; returns whether it has ended."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.ended.wait(), limit)
        return self.ended.is_set()

    def signal(self, number: int) -> None:
        """Sends a signal to its group, of which there may be a rest when it has ended itself."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def read(
        self, take: Callable[[bytes, bool], object], drain: Callable[[], Awaitable[None]]
    ) -> None:
        """Reads what it prints, and whether to stderr; after some lines, waits for `drain`.

        Lines have their ends. One that has none for a second is taken without.
        """

        async def pump(pipe: IO[bytes], reader: _PipeReader, is_error: bool) -> None:
            lines = Lines()
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
            try:
                while data := await self._more(reader, lines, is_error, take):
                    if is_error:
                        # A traceback comes after what was printed before it, if both are there.
                        await asyncio.sleep(0)
                    for line in lines.feed(data):
                        take(line, is_error)
                    reader.untaken -= len(data)
                    await drain()
            finally:
                transport.close()
                if rest := lines.end():
                    take(rest, is_error)

        out, err = self._pipes
        await asyncio.gather(pump(*out, False), pump(*err, True))

    async def catch_up(self, pause: float) -> None:
        """Waits until all that has been printed by now is taken; looks again after each pause."""
        while any(reader.untaken or _unread(pipe) for pipe, reader in self._pipes):
            await asyncio.sleep(pause)

    @staticmethod
    async def _more(
        reader: asyncio.StreamReader,
        lines: Lines,
        is_error: bool,
        take: Callable[[bytes, bool], object],
    ) -> bytes:
        """What is read next, at the end nothing."""
        if lines.is_waiting:
            try:
                return await asyncio.wait_for(reader.read(_PIECE_BYTES), _UNFINISHED_S)
            except asyncio.TimeoutError:
                take(lines.unfinished(), is_error)
        return await reader.read(_PIECE_BYTES)
