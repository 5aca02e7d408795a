"""Compiled kernels on disk, so that only the first process that needs one compiles it.

Any number of processes may use one folder at a time: a file is written under another name and then
renamed, so that nobody reads half of one, and it begins with a digest of the rest, so that one that
is damaged counts for nothing. Without a folder that can be used, every process compiles, and says
so once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import tempfile

_logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size


def folder_of_cupy() -> pathlib.Path | None:
    """Where CuPy keeps its own kernels, or ``None`` if it was told to keep them in memory.

    CuPy 13 has a function for it, CuPy 14 has not; both go by these variables.
    """
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        return None
    folder = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    return pathlib.Path(folder)


class KernelCache:
    """Files in a folder, found by all that their content depends on; without one, nothing is kept.

    The folder is made when it is needed.
    """

    def __init__(self, folder: pathlib.Path | None) -> None:
        self._folder = folder

    def load(self, *key: str) -> bytes | None:
        """Returns what was saved under a key, or ``None`` if nothing was or it is damaged."""
        if self._folder is None:
            return None
        try:
            content = self._path(self._folder, key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _say_once(self._folder, error)
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return payload if digest == hashlib.sha256(payload).digest() else None

    def save(self, payload: bytes, *key: str) -> None:
        """Saves something under a key, in the place of what may be there."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                try:
                    file.write(hashlib.sha256(payload).digest() + payload)
                    file.close()
                    os.replace(file.name, self._path(self._folder, key))
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            _say_once(self._folder, error)

    @staticmethod
    def _path(folder: pathlib.Path, key: tuple[str, ...]) -> pathlib.Path:
        return folder / f"smorms3_dist-{hashlib.sha256(repr(key).encode()).hexdigest()}.cubin"


_said: set[pathlib.Path] = set()


def _say_once(folder: pathlib.Path, error: OSError) -> None:
    if folder not in _said:
        _said.add(folder)
        _logger.warning(
            "every process compiles its kernels for GPUs: %s cannot be used (%s)", folder, error
        )
