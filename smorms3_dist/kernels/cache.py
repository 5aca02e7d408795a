"""Compiled kernels on disk, so that only the first process that needs one compiles it.

Any number of processes may use one folder at a time: a file is written under another name and then
renamed, so that nobody reads half of one, and it begins with a digest of the rest, so that one that
is damaged counts for nothing. Where no folder can be used, every process compiles, and rank 0 says
so once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import tempfile
from collections.abc import Sequence

_logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size

# What files and folders raise, and a user without a home, of whom containers have many.
_REFUSED = (OSError, RuntimeError)


class KernelCache:
    """Files in folders, found by all that their content depends on.

    A file goes into the first of the folders that takes it, and is found in any of them. Without
    folders, nothing is kept.

    Args:
        folders: They are made when they are needed.
        suffix: How the names of the files end.
        variable: The environment variable that names another folder.

    Attributes:
        warns: Whether this process says what is wrong with the folders and files.
    """

    def __init__(self, folders: Sequence[pathlib.Path], suffix: str, variable: str) -> None:
        self.warns = False
        self._folders = folders
        self._suffix = suffix
        self._variable = variable
        self._said: set[str] = set()

    def load(self, *key: str) -> bytes | None:
        """Returns what was saved under a key, or ``None`` if nothing was or it is damaged."""
        for folder in self._folders:
            try:
                path = self._path(folder, key)
                content = path.read_bytes()
            except _REFUSED:
                continue
            digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if digest == hashlib.sha256(payload).digest():
                return payload
            self.say_once(f"{path} is damaged: the kernel in it is compiled again")
        return None

    def save(self, payload: bytes, *key: str) -> None:
        """Saves something under a key, in the place of what may be there."""
        refused = []
        for folder in self._folders:
            try:
                self._write(folder, hashlib.sha256(payload).digest() + payload, key)
                return
            except _REFUSED as error:
                refused.append(f"{folder} ({getattr(error, 'strerror', None) or error})")
        if refused:
            self.say_once(
                f"every process compiles its kernels, which cannot be kept in "
                f"{' or '.join(refused)}: name another folder with {self._variable}"
            )

    def _write(self, folder: pathlib.Path, content: bytes, key: tuple[str, ...]) -> None:
        path = self._path(folder, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(content)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def _path(self, folder: pathlib.Path, key: tuple[str, ...]) -> pathlib.Path:
        name = hashlib.sha256(repr(key).encode()).hexdigest()
        return folder.expanduser() / f"smorms3_dist-{name}{self._suffix}"

    def say_once(self, message: str) -> None:
        """Says what is wrong with the cache, if nothing like it was said before."""
        if self.warns and message not in self._said:
            self._said.add(message)
            _logger.warning("%s", message)


def cache_of_cupy() -> KernelCache:
    """Of kernels for GPUs: where CuPy keeps its own, if it was not told to keep them in memory.

    CuPy 13 has a function for it, CuPy 14 has not; both go by these variables.
    """
    in_memory = os.environ.get("CUPY_CACHE_IN_MEMORY") == "1"
    return _cache("CUPY_CACHE_DIR", [] if in_memory else ["~/.cupy/kernel_cache"], ".cubin")


def cache_of_numba() -> KernelCache:
    """Of kernels for CPUs: where Numba would keep them, first of all beside their source."""
    beside = pathlib.Path(__file__).with_name("__pycache__")
    return _cache("NUMBA_CACHE_DIR", [beside, "~/.cache/numba"], ".numba")


def _cache(variable: str, folders: Sequence[str | pathlib.Path], suffix: str) -> KernelCache:
    named = os.environ.get(variable)
    folders = [named] if named and folders else folders
    return KernelCache(list(map(pathlib.Path, folders)), suffix, variable)
