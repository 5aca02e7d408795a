"""Files that exist under their names once they are whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from smorms3_dist.checkpoint.files.directory import new_token
from smorms3_dist.checkpoint.files.errors import CheckpointError, naming


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Opens a new file, which gets its name where the context ends; with the name that it has now.

    If the context fails, nothing is left.

    Raises:
        CheckpointError: If it exists or cannot be written.
    """
    if os.path.lexists(path):
        raise CheckpointError(path, "exists already: remove it first, or choose another name")
    temporary = path.parent / f".{path.name}.{new_token()}"
    try:
        with naming(temporary, "written"):
            file = open(temporary, "xb")  # noqa: SIM115
        try:
            yield file, temporary
            with naming(temporary, "written"):
                file.flush()
                os.fsync(file.fileno())
                os.rename(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                file.close()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
