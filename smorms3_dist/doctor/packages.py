"""Judges Python and the packages that training needs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Sequence
from importlib import import_module, metadata

from smorms3_dist.compat import Record
from smorms3_dist.compat.chainer_install import VERSION
from smorms3_dist.compat.importer import INSTALL_CHAINER
from smorms3_dist.doctor.findings import Finding, green, red, summary, yellow
from smorms3_dist.version import NEWEST_PYTHON, OLDEST_PYTHON, TESTED_PYTHONS

_NUMPY_TESTED = 2


@dataclasses.dataclass(frozen=True)
class Package:
    """A package; without a version if it cannot be imported, and trouble if it is installed."""

    version: str = ""
    trouble: str = ""


def load(name: str) -> Package:
    """Imports a package."""
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        return Package() if error.name == name else Package(trouble=summary(error))
    except (Exception, SystemExit) as error:  # whatever it fails with, it is the answer
        return Package(trouble=summary(error))
    try:
        return Package(metadata.version(name))
    except metadata.PackageNotFoundError:
        return Package(str(getattr(module, "__version__", "of an unknown version")))


def python(implementation: str, version: tuple[int, ...], executable: str) -> Finding:
    """Judges the interpreter."""
    found = f"{implementation} {'.'.join(map(str, version))} ({executable})"
    if implementation != "CPython" or version[:2] < OLDEST_PYTHON:
        return red(found, f"use {TESTED_PYTHONS}")
    if version[:2] > NEWEST_PYTHON:
        return yellow(f"{found}, newer than any tested", f"use {TESTED_PYTHONS} if it fails")
    return green(found)


def numpy(package: Package, python_version: tuple[int, ...]) -> Finding:
    """Judges NumPy, whose oldest version depends on that of Python."""
    oldest = (2, 1) if python_version >= (3, 13) else (1, 23)
    at_least = f"pip install 'numpy>={'.'.join(map(str, oldest))}'"
    if not package.version:
        return _absent(package, at_least)
    version = _numbers(package.version)
    if version < oldest:
        return red(f"{package.version} is too old", at_least)
    if version[0] > _NUMPY_TESTED:
        return yellow(f"{package.version}, newer than any tested", "pip install 'numpy<3'")
    return green(package.version)


def chainer(package: Package) -> Finding:
    """Judges Chainer, imported with the patches."""
    if package.trouble:
        remedy = f"pip uninstall chainer, then {INSTALL_CHAINER}"
        return red(f"cannot be imported ({package.trouble})", remedy)
    if not package.version:
        return red("not installed", INSTALL_CHAINER)
    if package.version != VERSION:
        return red(f"{package.version}, but the patches are for {VERSION}", INSTALL_CHAINER)
    return green(package.version)


def patches(records: Sequence[Record], imported: Container[str]) -> Finding:
    """Judges the patches of Chainer, of whose modules some have been imported."""
    others = [record for record in records if not record.applied]
    late = ", ".join(r.name for r in others if r.needed and r.module in imported)
    if late:
        return red(f"needed, but not applied: {late}", "import smorms3_dist before Chainer")
    kinds = {
        "applied": [r.name for r in records if r.applied],
        "needed, applied when their modules are imported": [r.name for r in others if r.needed],
        "not needed": [r.name for r in others if not r.needed],
    }
    listed = (f"{len(names)} {kind} ({', '.join(names)})" for kind, names in kinds.items() if names)
    return green("; ".join(listed))


def numba(package: Package) -> Finding:
    """Judges Numba, which compiles updates for CPUs."""
    if package.version:
        return green(f"{package.version}, compiles updates for CPUs")
    if package.trouble:
        remedy = "pip install --upgrade numba, or do without it: pip uninstall numba"
        return red(f"cannot be imported ({package.trouble})", remedy)
    return yellow(
        "not installed: updates on CPUs run in NumPy, with the same results, several times slower",
        "pip install numba",
    )


def xxhash(package: Package) -> Finding:
    """Judges xxhash, which checkpoints need."""
    if not package.version:
        return _absent(package, "pip install 'xxhash>=3'")
    if _numbers(package.version) < (3,):
        return red(f"{package.version} is too old for checkpoints", "pip install 'xxhash>=3'")
    return green(package.version)


def _absent(package: Package, remedy: str) -> Finding:
    if package.trouble:
        return red(f"cannot be imported ({package.trouble})", f"{remedy} --force-reinstall")
    return red("not installed", remedy)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
