"""Tracebacks of a script as if Python itself had run it, without what runs and imports for it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from types import TracebackType

from smorms3_dist.compat import importer

_IMPORTLIB = "<frozen importlib._bootstrap"


def without_own_frames(error: BaseException, runner: str) -> TracebackType | None:
    """The traceback of what a script has raised, from its own first frame on.

    Args:
        error: What it has raised.
        runner: The file of the module that has run it.

    Returns:
        The traceback, which is ``None`` if the script, or a module in its place, has not begun.
    """
    mpi4py_runner = getattr(sys.modules.get("mpi4py.run"), "__file__", None)
    runners = {"<frozen runpy>", runpy.__file__, runner, mpi4py_runner}
    frames = list(_frames(error.__traceback__))
    begun = 0
    while begun < len(frames) and frames[begun].tb_frame.f_code.co_filename in runners:
        begun += 1
    own = [frame for frame in frames[begun:] if not _imports(frame)]
    if not own and not isinstance(error, ImportError | SyntaxError):
        return error.__traceback__  # nobody has foreseen it
    found = None
    for frame in reversed(own):
        found = TracebackType(found, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return found


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _imports(frame: TracebackType) -> bool:
    file = frame.tb_frame.f_code.co_filename
    return file == importer.__file__ or file.startswith(_IMPORTLIB)
