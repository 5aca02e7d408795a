"""Runs a command for at most so long, and leaves no process of it behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO

from smorms3_dist.launch.child import members, signal_name

_GRACE_S = 3.0
"""How long a command may take to end by itself when it is asked to: mpirun ends its ranks then."""

_KILL_ROUNDS = 100
_KILL_PAUSE_S = 0.01


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command has ended.

    Its trouble, empty if it succeeded, is to follow its name: ``ended with status 3``.
    """

    trouble: str
    stdout: str
    stderr: str


def run(command: Sequence[str], limit: float, environment: Mapping[str, str]) -> Ended:
    """Runs a command in a session of its own, all of which ends with it, or when time is over.

    An `OSError` says why it cannot be started.
    """
    # Not pipes, whose end only comes when every process that has them is gone; and not files, for
    # which there may be no room.
    with _memory("stdout") as stdout, _memory("stderr") as stderr:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            trouble = _described(process.wait(limit))
        except subprocess.TimeoutExpired:
            trouble = f"has not ended within {limit:g} s, and was killed"
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        finally:
            _kill_session(process.pid)
            process.wait()
        return Ended(trouble, _content(stdout), _content(stderr))


def _memory(name: str) -> IO[bytes]:
    return open(os.memfd_create(name), "r+b")


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _described(status: int) -> str:
    if status == 0:
        return ""
    return f"ended with status {status}" if status > 0 else f"was killed by {signal_name(-status)}"


def _kill_session(leader: int) -> None:
    """Kills what is left of a session: ranks are in process groups of their own."""
    for _ in range(_KILL_ROUNDS):  # what is being killed may still start others
        left = members(leader)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_KILL_PAUSE_S)
