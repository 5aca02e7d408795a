"""Which steps of a directory a training has come by, and which are of another one.

A training that has neither saved nor loaded what it finds must not replace it, nor save below it:
the next start would go on from the other training. One that has gone back to an older step leaves
the newer ones behind: they are set aside, and are never the newest again.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable

from smorms3_dist.optimizer.optimizer import ShardedOptimizer


class Lineage:
    """What a training knows of the steps in one directory; alike on all ranks.

    Attributes:
        parent: The step that it has saved or loaded last; ``None`` before that.
    """

    def __init__(self) -> None:
        self.parent: int | None = None
        self._own: set[int] = set()
        self._left_behind: set[int] = set()
        self._replaceable: set[int] = set()

    @classmethod
    def of(cls, optimizer: ShardedOptimizer, directory: str | os.PathLike[str]) -> Lineage:
        """That of the training of an optimizer."""
        return _lineages.setdefault(optimizer, {}).setdefault(os.path.abspath(directory), cls())

    def note_loaded(self, step: int, there: Iterable[int], asked_for: bool) -> None:
        """Notes that a step has been loaded.

        Args:
            step: The step.
            there: The steps that are there, whole or damaged.
            asked_for: Whether this very step was asked for, and not the newest.
        """
        newer = {number for number in there if number > step}
        self.parent = step
        self._own = set(there) - newer
        # If the newest was asked for, newer ones are damaged, or not on all hosts.
        self._left_behind, self._replaceable = (newer, set()) if asked_for else (set(), newer)

    def note_saving(self, step: int) -> None:
        """Notes that a step is about to be committed: it may be there, even if that then fails."""
        self._own.add(step)

    def note_saved(self, step: int) -> None:
        """Notes that a step has been committed."""
        self.parent = step
        self._left_behind = set()

    def left_behind(self, there: Iterable[int]) -> list[int]:
        """The steps from which this training has gone back."""
        return sorted(self._left_behind & set(there))

    def strange(self, there: Iterable[int], step: int) -> list[int]:
        """The steps of another training that a save of a step would replace, or lie below."""
        known = self._own | self._left_behind | self._replaceable
        return sorted(number for number in there if number >= step and number not in known)

    def unrelated(self, there: Iterable[int]) -> list[int]:
        """All steps of another training."""
        known = self._own | self._left_behind | self._replaceable
        return sorted(set(there) - known)


_lineages: weakref.WeakKeyDictionary[ShardedOptimizer, dict[str, Lineage]] = (
    weakref.WeakKeyDictionary()
)
