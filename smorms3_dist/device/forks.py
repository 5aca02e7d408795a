"""Tells of children that are forked from a process with a GPU, which cannot use it."""

from __future__ import annotations

import logging
import os
import sys

_logger = logging.getLogger(__name__)

_FORKING = "multiprocessing.popen_fork"

_is_watching = False


def tell_of_forks(rank: int) -> None:
    """Lets rank 0 say, once, that ``multiprocessing`` forks a child while it has a GPU.

    Chainer's `MultiprocessIterator` does so at its first batch. Other ranks say nothing.
    """
    global _is_watching
    if rank == 0 and not _is_watching:
        _is_watching = True
        os.register_at_fork(before=_look)


def _look() -> None:
    global _is_watching
    frame = sys._getframe()
    while _is_watching and frame is not None:
        if frame.f_globals.get("__name__") == _FORKING:
            _is_watching = False
            _logger.warning(
                "a child is forked while this rank has a GPU, as MultiprocessIterator does: such a "
                "child cannot use CUDA, and fails if its dataset does. Where it does, call "
                "multiprocessing.set_start_method('forkserver') before the communicator is made, "
                'with what the script does under `if __name__ == "__main__":`, or use '
                "MultithreadIterator"
            )
        frame = frame.f_back  # type: ignore[assignment]
