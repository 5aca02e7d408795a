"""Lets Chainer fork its workers on every Python, unless the script has chosen another start method.

Up to Python 3.13 ``multiprocessing`` forked on Linux. From 3.14 on, children come from a fork
server: each of them runs the main script's top level again, and gets what it works on by pickling.
Chainer's scripts were not written for that. Without ``if __name__ == "__main__"`` every worker of a
`MultiprocessIterator` trains as if it were the rank itself, over the same MPI; a dataset that holds
a function or an open file cannot be pickled, and one in memory is copied for each worker.

A fork is also what is safe in a rank: MPI, BLAS and this package have threads in it, but a worker
needs none of them. It reads examples with NumPy and hands them over a pipe. MPI must not be called
in it, which no dataset does. Where a fork is not wanted, as with InfiniBand without UCX or CUDA in
the dataset, ``multiprocessing.set_start_method`` says so, as it always has.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

# The start method that the script has chosen; None while it has not.
_chosen: str | None = None


class ForkingMultiprocessing:
    """Stands in for ``multiprocessing`` in a module of Chainer's that starts workers."""

    def __getattr__(self, name: str) -> Any:
        import multiprocessing

        return getattr(multiprocessing.get_context(_chosen or "fork"), name)


forking = ForkingMultiprocessing()


def forks_no_more() -> bool:
    """Whether this Python on Linux starts children in another way, if it is not told how."""
    import multiprocessing

    return sys.platform == "linux" and multiprocessing.get_all_start_methods()[0] != "fork"


def remember_choice(module: ModuleType) -> None:
    """Makes ``set_start_method`` remember what it is called with.

    ``get_start_method`` alone does not tell: any lock or queue that somebody makes, tqdm say, turns
    the default into what looks like a choice.
    """
    global _chosen
    _chosen = module.get_start_method(allow_none=True)
    original = module.set_start_method

    @functools.wraps(original)
    def set_start_method(method: str | None, force: bool = False) -> None:
        global _chosen
        original(method, force)
        _chosen = method

    module.set_start_method = set_start_method  # type: ignore[attr-defined]


def mend_parallel_updater(module: ModuleType) -> None:
    """Forks the workers of `MultiprocessParallelUpdater`, which are a class of their own."""
    module.multiprocessing = forking  # type: ignore[attr-defined]
    module._Worker._Popen = staticmethod(lambda worker: forking.Process._Popen(worker))
