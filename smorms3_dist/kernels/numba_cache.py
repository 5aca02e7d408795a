"""Numba's compiled functions in this package's cache, in the place of Numba's own.

Numba's own ends a training where no folder can be written, the disk is full or a file is damaged,
and takes machine code as it is in the file. This one is of no use at worst.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any

from smorms3_dist.kernels.cache import KernelCache
from smorms3_dist.kernels.numba_without_scipy import prepare_compilation

import numba


class NumbaCache:
    """What a function compiled by Numba asks for its machine code, and hands it to.

    Args:
        cache: Where it is kept.
        source: What changes with everything that is compiled into the function.
        name: The function's name.
    """

    cache_path = None

    def __init__(self, cache: KernelCache, source: str, name: str) -> None:
        self._cache = cache
        self._key = source, name, numba.__version__, sys.version

    def load_overload(self, signature: Any, target: Any) -> Any | None:
        """Returns the compiled function for arguments of some types, or ``None``."""
        try:
            content = self._cache.load(*self._key_for(signature, target.codegen()))
            if content:
                # What machine code calls; all else that Numba has only a compilation needs.
                from numba.core.runtime import rtsys

                rtsys.initialize(target)
                return _form().rebuild(target, pickle.loads(content))
        except Exception as error:  # They are Numba's insides, which any version may change.
            self._give_up(error)
        prepare_compilation()
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keeps a compiled function."""
        try:
            from numba.core.serialize import dumps

            content = dumps(_form().reduce(compiled))
            self._cache.save(content, *self._key_for(signature, compiled.codegen))
        except Exception as error:
            self._give_up(error)

    def _key_for(self, signature: Any, codegen: Any) -> tuple[str, ...]:
        return *self._key, str(signature), repr(codegen.magic_tuple())

    def _give_up(self, error: Exception) -> None:
        self._cache.say_once(
            f"every process compiles its kernels, which cannot be kept with Numba "
            f"{numba.__version__} ({type(error).__name__}: {error})"
        )


def _form() -> Any:
    """Numba's own way to take a compiled function apart, without its search for a folder."""
    from numba.core.caching import CompileResultCacheImpl

    return object.__new__(CompileResultCacheImpl)
