"""Applies patches to modules at the moment they are imported.

A finder on ``sys.meta_path`` reacts to the names of the patched modules and to no other. It lets
the remaining finders find the module, then runs the module's own loader inside what the patches
provide. Another finder, behind all others, says what to do where there is no Chainer to be patched.

Patches are made when the first package is imported that has something to be mended: a launcher
imports none. Nothing here is a subclass of what ``importlib.abc`` has, whose import takes as long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader

    from smorms3_dist.compat.patch import Patch
else:
    Loader = object

INSTALL_CHAINER = "python -m smorms3_dist install-chainer"
"""What to run where Chainer is not installed."""


class Importer:
    """The finder; one instance holds the patches, and the names of those that are in force.

    Args:
        packages: The packages of the patched modules.
        patches: Makes the patches; imports none of these packages.
    """

    def __init__(self, packages: Collection[str], patches: Callable[[], Sequence[Patch]]) -> None:
        self.applied: set[str] = set()
        self._packages = packages
        self._make_patches = patches

    @classmethod
    def of(cls, patches: Sequence[Patch]) -> Importer:
        """The finder for patches that are there."""
        return cls({patch.module.partition(".")[0] for patch in patches}, lambda: patches)

    @cached_property
    def _patches(self) -> Mapping[str, list[Patch]]:
        found: dict[str, list[Patch]] = {}
        for patch in self._make_patches():
            found.setdefault(patch.module, []).append(patch)
        return found

    def install(self) -> None:
        """Puts the finder in front of all others and mends what is imported already."""
        if self in sys.meta_path:
            return
        sys.meta_path.insert(0, self)
        sys.meta_path.append(_MissingChainer())
        if not any(package in sys.modules for package in self._packages):
            return
        for name in self._patches:
            module = sys.modules.get(name)
            if module is not None:
                self._mend(module, self._needed(name))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds a patched module with the other finders; knows nothing of other modules."""
        if fullname.partition(".")[0] not in self._packages or fullname not in self._patches:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _PatchingLoader(spec.loader, self)
                return spec
        return None

    def execute(self, module: ModuleType, loader: Loader) -> None:
        """Executes a module, with its own loader if it can be, and applies the needed patches."""
        # Whether others are needed, the module itself may have to say.
        early = [p for p in self._patches[module.__name__] if p.is_early and p.is_needed]
        fill = next((patch.instead for patch in early if patch.instead), loader.exec_module)
        with ExitStack() as stack:
            for patch in early:
                stack.enter_context(patch.during())
            fill(module)
        self._mend(module, self._needed(module.__name__))

    def _needed(self, name: str) -> list[Patch]:
        return [patch for patch in self._patches[name] if patch.is_needed]

    def _mend(self, module: ModuleType, patches: list[Patch]) -> None:
        for patch in patches:
            patch.mend(module)
            self.applied.add(patch.name)


class _MissingChainer:
    """The last finder, which is asked for what no other has found: says how to get Chainer."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in ("chainer", "chainermn"):
            raise ModuleNotFoundError(
                f"Chainer is not installed. This builds and installs it: {INSTALL_CHAINER}",
                name=fullname,
            )
        return None


class _PatchingLoader(Loader):
    """Stands in for a module's loader until the module is executed."""

    def __init__(self, loader: Loader, importer: Importer) -> None:
        self._loader = loader
        self._importer = importer

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        # Loaders look themselves up in the spec, and the module keeps what it finds there.
        spec.loader = self._loader
        try:
            return self._loader.create_module(spec)
        finally:
            spec.loader = self

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module shows its own loader, as without patches.
        vars(module)["__loader__"] = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._importer.execute(module, self._loader)
