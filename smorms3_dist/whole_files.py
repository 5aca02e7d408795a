"""Files that commands write: whole under their names, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside a file for its new content, which replaces it where the context ends.

    If the context fails, the file is as it was, and nothing else is left.

    Raises:
        OSError: If it cannot be replaced.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
