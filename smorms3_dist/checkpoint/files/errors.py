"""The exceptions of this package: a file or directory, and what is wrong with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint cannot be written or read.

    Args:
        path: The file or directory.
        reason: What is wrong with it, and what to do about it.

    Attributes:
        path: The file or directory.
        reason: What is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class NewerVersionError(CheckpointError):
    """A checkpoint is whole, but was saved by a newer version, which this one cannot read."""


class OtherTrainingError(CheckpointError):
    """A checkpoint is whole, but not one of this training; older ones would not be, either."""


@contextlib.contextmanager
def naming(path: str | Path, attempt: str, origin: str = "") -> Iterator[None]:
    """Turns what the operating system refuses into a `CheckpointError`.

    Args:
        path: What is worked on, for errors that name no file.
        attempt: What is done to it, as in "cannot be written".
        origin: Whose file it is, in words to put into brackets.
    """
    try:
        yield
    except OSError as error:
        whose = f" ({origin})" if origin else ""
        raise CheckpointError(
            error.filename or path, f"cannot be {attempt}{whose}: {error.strerror or error}"
        ) from error
