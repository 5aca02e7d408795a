"""Applies the patches in the children of ``multiprocessing``, before they import anything else.

A forked child inherits the patches. A child started by ``spawn`` or ``forkserver`` is a new
interpreter: it reads its preparation data, runs the main script's top level and imports the modules
of what it is to run, Chainer among them. The patches therefore travel in the preparation data: one
entry more, which applies them as it is unpickled, and which ``multiprocessing`` itself ignores.

A rank's child is no rank, but its environment says that it is its parent. MPI, initialized there
again, would read the shared memory of the parent: one of them crashes, or waits for ever.
"""

from __future__ import annotations

import functools
import os
import runpy
import signal
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_KEY = "smorms3_dist.compat"
# By mpirun or srun, with PMIx; by those of MPICH.
_RANKS = ("PMIX_RANK", "PMI_RANK")
# Who has started this process, if that is a new child. multiprocessing itself knows its parent only
# once the main script has been run.
_parent: int | None = None


class _ApplyInChild:
    """Pickles to a call that applies the patches in the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By path, because the child's sys.path is not yet the parent's when this is unpickled.
        child = str(Path(__file__).with_name("_child.py"))
        return runpy.run_path, (child, {"parent": os.getpid()})


def patch_preparation_data(spawn: ModuleType) -> None:
    """Makes ``multiprocessing.spawn.get_preparation_data`` carry the patches."""
    original = spawn.get_preparation_data

    @functools.wraps(original)
    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**original(name), _KEY: _ApplyInChild()}

    spawn.get_preparation_data = get_preparation_data  # type: ignore[attr-defined]


def patch_preload(forkserver: ModuleType) -> None:
    """Makes a fork server import this package before the other modules it is told to preload.

    The server would import the main script, which is preloaded by default on some versions of
    Python, even before that. The children do it themselves instead.
    """
    original = forkserver.ForkServer.ensure_running

    @functools.wraps(original)
    def ensure_running(self: Any) -> None:
        if self._preload_modules:
            others = [name for name in self._preload_modules if name not in (_KEY, "__main__")]
            self._preload_modules = [_KEY, *others]
        original(self)

    forkserver.ForkServer.ensure_running = ensure_running
    # The module's function is a bound method, taken before the class was changed.
    forkserver.ensure_running = forkserver._forkserver.ensure_running  # type: ignore[attr-defined]


def leave_mpi_alone(parent: int) -> None:
    """Called in a new child: lets a rank's child import mpi4py, as its parent has, without MPI."""
    global _parent
    _parent = parent
    if _is_of_a_rank() and find_spec("mpi4py") is not None:
        import mpi4py

        mpi4py.rc.initialize = False


def refuse_communicator(utility: ModuleType) -> None:
    """Makes each of ChainerMN's communicators an error in a rank's child, which knows no others.

    A new child that asks for one ends the rank, too: a pool would start another child for ever.
    """
    original = utility.init_ranks

    @functools.wraps(original)
    def init_ranks(mpi_comm: Any) -> Any:
        import multiprocessing

        is_child = _parent is not None or multiprocessing.parent_process() is not None
        if not is_child or not _is_of_a_rank():
            return original(mpi_comm)
        error = RuntimeError(
            "a communicator was asked for in a child that multiprocessing has started in a rank, "
            "and which is no rank itself. Children that are spawned, or come from a fork server, "
            "run the script's top level again: what only ranks are to do must stand under "
            '`if __name__ == "__main__":`'
        )
        if _parent is not None:
            traceback.print_exception(error)
            sys.stderr.flush()
            os.kill(_parent, signal.SIGTERM)
        raise error

    utility.init_ranks = init_ranks  # type: ignore[attr-defined]


def _is_of_a_rank() -> bool:
    return any(name in os.environ for name in _RANKS)
