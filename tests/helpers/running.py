"""Starts smorms3-dist run for tests, talks with it, and ends it with all its processes."""

from __future__ import annotations

import contextlib
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from smorms3_dist.launch.run_module import python_command

import mpirun
import pytest


def _heed() -> None:
    for number in signal.SIGINT, signal.SIGQUIT:
        signal.signal(number, signal.SIG_DFL)


class Running:
    """A launcher that runs, and what it prints, stdout and stderr in one.

    After 90 seconds it is killed, and the test fails.
    """

    def __init__(self, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*python_command("smorms3_dist"), "run", *map(str, arguments)],
            env=mpirun.environment(**environment),
            cwd=cwd,
            # Else a shell that has started the tests in the background decides that.
            preexec_fn=_heed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._deadline = time.monotonic() + 90
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._seen: list[bytes] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _next(self) -> bytes | None:
        try:
            line = self._lines.get(timeout=max(self._deadline - time.monotonic(), 0.01))
        except queue.Empty:
            # Its agents see that it is gone, and end the ranks.
            self.process.kill()
            self.process.wait()
            pytest.fail(f"{self.process.args} took too long; its output:\n{self.output}")
        if line is not None:
            self._seen.append(line)
        return line

    def wait_for(self, pattern: str) -> str:
        """Reads lines until one matches, and returns that one."""
        while (line := self._next()) is not None:
            text = line.decode(errors="replace")
            if re.search(pattern, text):
                return text
        raise AssertionError(f"no line with {pattern!r}:\n{self.output}")

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits for its end; returns the exit status."""
        while self._next() is not None:
            pass
        return self.process.wait()

    @property
    def raw(self) -> bytes:
        """What it has printed."""
        return b"".join(self._seen)

    @property
    def output(self) -> str:
        """What it has printed, as text."""
        return self.raw.decode(errors="replace")


def run(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    """Runs it to its end; returns the exit status and what it has printed."""
    running = Running(*arguments, cwd=cwd, **environment)
    return running.end(), running.output


def processes_with(mark: str) -> Iterator[int]:
    """The processes that have a text in their environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                yield int(path.parent.name)


def is_gone(pid: str) -> bool:
    """Whether a process has ended. It may still wait for its parent to take note."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
