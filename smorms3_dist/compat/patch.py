"""What a patch is: a name, a module, a reason, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType


def _nothing(module: ModuleType) -> None:
    """Mends nothing: for a patch that acts only while the module is executed."""


def with_names(**names: object) -> Callable[[ModuleType], None]:
    """A mend that gives a module names of its own."""
    return lambda module: vars(module).update(names)


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
        mend: Changes the executed module, for what is missing at run time.
    """

    name: str
    module: str
    reason: str
    needed: Callable[[], bool]
    during: Callable[[], AbstractContextManager[object]] = nullcontext
    mend: Callable[[ModuleType], None] = _nothing

    @cached_property
    def is_needed(self) -> bool:
        """What `needed` said when it was asked first."""
        return self.needed()
