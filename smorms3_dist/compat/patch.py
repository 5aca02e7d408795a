"""What a patch is: a name, a module, a reason, and what to do about it. And what many do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any


def _nothing(module: ModuleType) -> None:
    """Mends nothing: for a patch that acts only while the module is executed."""


def with_names(**names: object) -> Callable[[ModuleType], None]:
    """A mend that gives a module names of its own."""
    return lambda module: vars(module).update(names)


def with_names_in(function: str, **names: object) -> Callable[[ModuleType], None]:
    """A mend that gives one function of a module names of its own.

    For modules of which other functions compare the module ``numpy`` with another.
    """

    def mend(module: ModuleType) -> None:
        original = getattr(module, function)
        twin = FunctionType(original.__code__, {**vars(module), **names}, original.__name__)
        setattr(module, function, twin)

    return mend


class View:
    """A module with a few names of its own, for one module that uses names which that lacks."""

    def __init__(self, module: str, **names: object) -> None:
        vars(self).update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)


@contextmanager
def lent(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Has the modules in ``sys.modules`` for a while, and then what was there before."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@dataclass(frozen=True)
class Patch:
    """One cause of trouble and its mend.

    Attributes:
        name: Unique name, as `report` shows it.
        module: Full name of the only module that is touched.
        reason: One sentence: what breaks without the patch.
        needed: Tells whether the installed versions need it; called at most once, and not before
            the module is imported or the report asked for.
        during: Makes the context in which the module is executed, for what is missing at import.
        instead: Fills the module in place of its own code, for code that cannot be executed.
        mend: Changes the executed module, for what is missing at run time.
    """

    name: str
    module: str
    reason: str
    needed: Callable[[], bool]
    during: Callable[[], AbstractContextManager[object]] = nullcontext
    instead: Callable[[ModuleType], None] | None = None
    mend: Callable[[ModuleType], None] = _nothing

    @cached_property
    def is_needed(self) -> bool:
        """What `needed` said when it was asked first."""
        return self.needed()

    @property
    def is_early(self) -> bool:
        """Whether it does something before the module is executed, or while it is."""
        return self.instead is not None or self.during is not nullcontext
