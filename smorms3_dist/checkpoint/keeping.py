"""Which steps are kept, and what a user wants done with each once it is whole."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files.worth import MODES, Worth

_logger = logging.getLogger(__name__)

AfterSave = Callable[[int, Path], Any]
"""Is called with a step, and with its directory."""


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Which steps are kept.

    Attributes:
        last: How many of the newest; all if ``None``.
        every: Those that are multiples of it, too.
        best: The best one, too: the name of a value, and ``max`` or ``min``.

    Raises:
        ValueError: If a number is not positive, ``best`` is something else, or one of the others
            stands without ``last``.
    """

    last: int | None = None
    every: int | None = None
    best: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        for name, number in (("keep_last", self.last), ("keep_every", self.every)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be positive or None, not {number}")
        if self.best is not None:
            pair = tuple(self.best) if isinstance(self.best, (tuple, list)) else ()
            if len(pair) != 2 or not isinstance(pair[0], str) or pair[1] not in MODES:
                raise ValueError(
                    "keep_best is the name of a value and 'max' or 'min', such as "
                    f"('validation/main/accuracy', 'max'), not {self.best!r}"
                )
        for name, other in (("keep_every", self.every), ("keep_best", self.best)):
            if other is not None and self.last is None:
                raise ValueError(f"{name} says what to keep besides keep_last; give that, too")


def worth_of(best: tuple[str, str], values: Mapping[str, Any]) -> tuple[Worth, str]:
    """What a step is worth by values that are reported, and why it has none, in words.

    Args:
        best: As in `Keeping`.
        values: The values by name: numbers, or what Chainer reports as such.
    """
    name, mode = best
    if name not in values:
        return Worth(name, mode, None), "is not reported in its iteration"
    value = values[name]
    try:
        number = float(getattr(value, "array", value))
    except (TypeError, ValueError):
        return Worth(name, mode, None), f"is no number, but {value!r:.80}"
    if not math.isfinite(number):
        return Worth(name, mode, None), f"is {number}"
    return Worth(name, mode, number), ""


def do_after_save(after_save: AfterSave, step: int, path: Path) -> None:
    """Calls what is to be called; its failure is logged, for the step is whole all the same."""
    try:
        after_save(step, path)
    except Exception as error:
        name = getattr(after_save, "__qualname__", repr(after_save))
        _logger.exception(
            "after_save: %s has failed for step %d, which is whole in %s, and the training goes "
            "on: %r",
            name,
            step,
            path,
            error,
        )
