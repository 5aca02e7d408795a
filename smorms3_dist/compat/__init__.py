"""Makes Chainer 7.8.1 import and train on today's Python, NumPy, setuptools and other libraries.

Chainer is not changed on disk. Each cause of trouble has one named patch (see `patches`), which is
applied when the module that it mends is imported, and only where the installed versions need it.
`apply` is called by ``import smorms3_dist``; `report` tells what was done (tested in
tests/compat/test_report.py).

Its modules, in reading order:

- `patch`: what a patch is (test_report.py).
- `patches`: the registry: every patch, when it is needed, and what it does.
- `library_patches`: those for SciPy, h5py, protobuf and onnx (test_patches.py).
- `lazy_libraries`: those that import SciPy and others when they are used (test_patches.py).
- `cupy_patches`: those for CuPy (test_cupy.py).
- `requirements`: the part of ``pkg_resources`` that Chainer uses.
- `importer`: applies patches when the modules that they mend are imported (test_import.py).
- `tracebacks`: those of scripts, without what the above adds to them (test_tracebacks.py).
- `chainer_install`: builds and installs Chainer (test_chainer_install.py).
- `forking`: the workers of Chainer's that are forked on every Python (test_rank_children.py).
- `children`, `_child`: apply them in the children of ``multiprocessing`` (test_children.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from smorms3_dist.compat.importer import Importer

if TYPE_CHECKING:
    from smorms3_dist.compat.patch import Patch

__all__ = ["Record", "Report", "apply", "report"]

PACKAGES = frozenset({"chainer", "chainermn", "multiprocessing", "onnx_chainer"})
"""What has modules that patches mend."""


def _patches() -> tuple[Patch, ...]:
    from smorms3_dist.compat.patches import PATCHES

    return PATCHES


_importer = Importer(PACKAGES, _patches)


class Record(NamedTuple):
    """What became of one patch.

    Attributes:
        name: The patch's name.
        module: The full name of the only module that the patch touches.
        reason: One sentence: what breaks without the patch.
        needed: Whether the installed versions need it.
        applied: Whether it is in force; a needed patch waits until its module is imported.
    """

    name: str
    module: str
    reason: str
    needed: bool
    applied: bool

    def __str__(self) -> str:
        if self.applied:
            state = "applied"
        elif self.needed:
            state = "needed, waits for the import"
        else:
            state = "not needed"
        return f"{self.name} ({self.module}): {state}. {self.reason}"


class Report(tuple[Record, ...]):
    """The records of all patches; prints as one line a patch."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def apply() -> None:
    """Arranges that every needed patch is applied when its module is imported.

    Modules that are already imported are mended at once. Calling it again does nothing more.
    """
    _importer.install()


def report() -> Report:
    """Returns one record for each patch, in the order of the registry.

    Deciding whether a patch is needed imports NumPy, and tries to import what Chainer would import.
    """
    return Report(
        Record(
            patch.name,
            patch.module,
            patch.reason,
            needed=patch.is_needed,
            applied=patch.name in _importer.applied,
        )
        for patch in _patches()
    )


def __getattr__(name: str) -> Any:
    # Made when something is imported that they mend.
    if name == "PATCHES":
        return _patches()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
