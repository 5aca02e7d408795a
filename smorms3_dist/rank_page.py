"""What a rank and the launcher beside it tell each other: a page of shared memory.

`smorms3-dist run` starts an agent for each rank, which makes the page and names its file in the
environment. The rank notes there how far it has come, at the cost of a few stores, and looks there
whether it is asked to end. A rank that was started otherwise has a page that nobody reads.
"""

from __future__ import annotations

import atexit
import faulthandler
import mmap
import os
import signal
import struct
import sys
import time

PAGE = "SMORMS3_PAGE"
"""The variable with the name of the page's file."""

PREEMPTED = 75
"""The exit status after a checkpoint on request: that of a temporary failure, as sysexits.h has
it."""

_NAMES = (
    "entered finished failed leaving attached handles preempted asked told waits said ended "
    "saves saved"
)
_FIELDS = {name: index for index, name in enumerate(_NAMES.split())}
_NUMBER = struct.Struct("<q")
NBYTES = len(_FIELDS) * _NUMBER.size

_TELL_S = 1.0
"""How long a rank that fails waits until its launcher knows."""


class Page:
    """Numbers in a file that two processes see, or of this process alone; each is written by one.

    Attributes:
        entered: Updates that the rank has begun. Written by the rank, as all that follows.
        finished: Updates that it has finished.
        failed: Its exit status if it is about to fail, else 0.
        leaving: Whether it waits until the agent has told of that.
        attached: Whether the rank has the page, and prints its stacks at SIGQUIT.
        handles: Whether the rank ends by itself when it is asked to.
        preempted: Whether it has saved a checkpoint because it was asked to end.
        asked: Whether it is asked to save a checkpoint and to end. Written by the agent.
        told: Whether the launcher has been told that the rank fails. Written by the agent.
        waits: Whether the rank waits for others. Written by the rank, as all that follows.
        said: How often it has said that it waits for long.
        ended: Whether its script has ended.
        saves: How many checkpoints it has made whole, for all ranks.
        saved: The step of the last one.
    """

    def __init__(self, path: str | None = None) -> None:
        self._memory: mmap.mmap | bytearray
        if path is None:
            self._memory = bytearray(NBYTES)
        else:
            with open(path, "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), NBYTES)

    def __getattr__(self, name: str) -> int:
        if name not in _FIELDS:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return int(_NUMBER.unpack_from(self._memory, _FIELDS[name] * _NUMBER.size)[0])

    def __setattr__(self, name: str, value: int) -> None:
        if name in _FIELDS:
            _NUMBER.pack_into(self._memory, _FIELDS[name] * _NUMBER.size, value)
        else:
            object.__setattr__(self, name, value)


def leave() -> None:
    """Waits until the launcher knows that this process fails, if it does.

    To be called before MPI's abort, for which srun kills all processes of a job, agents as well.
    """
    if not page.attached or not page.failed:
        return
    page.leaving = 1
    deadline = time.monotonic() + _TELL_S
    while not page.told and time.monotonic() < deadline:
        time.sleep(0.005)


def note_saved(step: int) -> None:
    """Notes that the checkpoint of a step is whole."""
    page.saved = step
    page.saves += 1


def note_end() -> None:
    """Notes that the script has ended, whatever the process still waits for."""
    page.ended = 1


def _attached() -> Page:
    """The launcher's page, if this process has a launcher.

    It prints its stacks at SIGQUIT then, even from within a call of a library in C. What it starts
    has no page.
    """
    path = os.environ.pop(PAGE, None)
    page = Page(path)
    if path is not None:
        faulthandler.register(signal.SIGQUIT, sys.__stderr__ or 2, all_threads=True)
        page.attached = 1
        atexit.register(leave)
        atexit.register(note_end)
    return page


page = _attached()
"""The page of this process."""


class Preempted(SystemExit):
    """Ends a rank after a checkpoint that was asked for, with the status `PREEMPTED`.

    To be raised by all ranks at the same step, when the checkpoint is there.
    """

    def __init__(self) -> None:
        super().__init__(PREEMPTED)
        page.preempted = 1
