"""Numba's compiler, loaded without SciPy's linear algebra.

Before its first compilation Numba imports ``scipy.linalg``, to see whether there is a BLAS. That
takes as long as all the rest of a first update. No loop here needs it; a function of somebody else
that does, imports it when it is compiled.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from types import ModuleType

from smorms3_dist.compat.patch import lent

_BLAS = ("scipy", "scipy.linalg", "scipy.linalg.cython_blas")


def prepare_compilation() -> None:
    """Loads what Numba has for arrays, as if SciPy were imported, where it is installed.

    Numba itself is imported before: it looks for the version of SciPy.
    """
    if "scipy.linalg" in sys.modules or PathFinder.find_spec("scipy") is None:
        return
    with lent({name: ModuleType(name) for name in _BLAS}):
        import numba.np.arraymath  # noqa: F401
