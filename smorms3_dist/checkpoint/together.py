"""Failing together: what one rank cannot do, none goes on without."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.collectives.base import Collectives


@contextlib.contextmanager
def together(
    collectives: Collectives, path: str | os.PathLike[str], who: str = "rank"
) -> Iterator[None]:
    """Fails on all ranks at the end of a block that has failed on one. Collective.

    The block itself must not communicate. Where it raises something else than a `CheckpointError`,
    as a Ctrl-C does, that rank goes on to raise it as it is.

    Args:
        collectives: The ranks.
        path: What the block works on, for errors that name no file.
        who: What stands before the number of the rank that has failed.

    Raises:
        CheckpointError: Of the first rank that has failed, with its number and its host.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:  # raised again below, when all ranks know of it
        error = raised
    mine = None
    if isinstance(error, CheckpointError):
        mine = type(error), error.path, error.reason
    elif error is not None:
        mine = CheckpointError, os.fspath(path), repr(error)
    everybodys = collectives.all_gather_object((socket.gethostname(), mine))
    if error is not None and not isinstance(error, CheckpointError):
        raise error
    for rank, (host, theirs) in enumerate(everybodys):
        if theirs is not None:
            kind, where, reason = theirs
            raise kind(where, f"{reason} ({who} {rank} on {host})") from error
