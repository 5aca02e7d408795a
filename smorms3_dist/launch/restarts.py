"""Whether a failure is worth another start: not where the same would come of it again."""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Sequence

_EARLY_S = 300.0
"""Ranks that make no steps that are known of may have worked, if they have run for longer."""

_OWN_WORDS = b"smorms3_dist: "
"""How lines begin that this package has added to those of the script."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """How a script has failed before its first step, in which nothing is different next time."""

    status: int
    last_words: bytes


def early_failure(
    status: int, steps: int, seconds: float, last_lines: Sequence[bytes]
) -> Failure | None:
    """What the failure of a script is, if it came early and may well come again.

    Args:
        status: The launcher's exit status.
        steps: Of the rank that has made most.
        seconds: How long the attempt has taken.
        last_lines: Of the rank that has failed first, to stderr if it has printed there.

    Returns:
        ``None`` for a failure after a step, by a signal, or of a kind that may heal by itself:
        what the system refuses, from memory to a connection.
    """
    if steps or seconds > _EARLY_S or status >= 128:
        return None
    words = [line for line in last_lines if line.strip() and not line.startswith(_OWN_WORDS)]
    last = words[-1] if words else b""
    kind = getattr(builtins, last.partition(b":")[0].decode(errors="replace"), None)
    if isinstance(kind, type) and issubclass(kind, OSError | MemoryError):
        return None
    return Failure(status, last)
