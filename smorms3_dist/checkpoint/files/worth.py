"""What steps are worth: the value by which a training keeps the best of them, in its manifest.

So the best step is found by looking, as the newest is: nothing has to be remembered between jobs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import Manifest
from smorms3_dist.checkpoint.files.steps import Steps

NOTE = "worth"
"""The key of a manifest's notes."""

MODES = ("max", "min")


class Worth(NamedTuple):
    """What a step is worth.

    Attributes:
        name: The name of the value, such as ``validation/main/accuracy``.
        mode: ``max`` if larger values are better, ``min`` if smaller ones are.
        value: The value, a finite number; ``None`` if there was none when the step was saved.
    """

    name: str
    mode: str
    value: float | None

    @classmethod
    def of(cls, manifest: Manifest) -> Worth | None:
        """That of a step; ``None`` if it was saved without."""
        note: Any = manifest.notes.get(NOTE)
        try:
            worth = cls(**note)
            right = worth.mode in MODES and isinstance(worth.name, str)
            right = right and (worth.value is None or math.isfinite(worth.value))
        except TypeError:
            return None
        return worth if right else None


def by_worth(worths: Mapping[int, Worth | None], name: str, mode: str) -> list[int]:
    """The steps that have a value, the best first; of equal ones the older."""
    values = {
        step: worth.value
        for step, worth in worths.items()
        if worth is not None and (worth.name, worth.mode) == (name, mode)
        if worth.value is not None
    }
    sign = -1 if mode == "max" else 1
    return sorted(values, key=lambda step: (sign * values[step], step))


class BestStep:
    """Looks which step of a directory is the best. It reads a manifest once, as long as it stays.

    Args:
        steps: The directory.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._seen: dict[int, tuple[int, Worth | None]] = {}

    def find(
        self,
        name: str,
        mode: str,
        new: Mapping[int, Worth | None] | None = None,
        without: Iterable[int] = (),
    ) -> int | None:
        """The best step that is whole.

        Args:
            name: As in `Worth`. Steps with other names and modes do not count.
            mode: As in `Worth`.
            new: What a step is worth that is about to be there.
            without: Steps that do not count.

        Raises:
            CheckpointError: If the directory cannot be read.
        """
        there = set(self._steps.numbers()) - {*without}
        self._seen = {step: self._look(step) for step in there}
        worths = {step: worth for step, (_, worth) in self._seen.items()} | dict(new or {})
        for step in by_worth(worths, name, mode):
            if step in (new or {}) or self._steps.is_whole(step):
                return step
        return None

    def _look(self, step: int) -> tuple[int, Worth | None]:
        try:
            written = (self._steps.path_of(step) / manifest_json.NAME).stat().st_mtime_ns
            known = self._seen.get(step)
            if known is not None and known[0] == written:
                return known
            return written, Worth.of(self._steps.manifest(step))
        except (CheckpointError, OSError):
            return 0, None
