"""What has to be alike on all ranks before a step, as facts with names.

If ranks differ in a hyperparameter, each owner would use its own, and the model would become half
one, half the other. So every rank writes down what it was told, in words; the ranks compare a
digest of that before each step (`smorms3_dist.step.agreement`), and the words where it differs.

What a rank has of its own is no fact: its batches, its gradients, when it looks at a clock. Hooks
that see whole gradients are facts of a second kind: a logger on rank 0 alone is usual, so ranks may
differ in them as long as all hooks together leave gradients and parameters alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from smorms3_dist.wording import ranks_in_words

Words = Mapping[str, str]
"""Values in words, by the name of the fact."""


class SharedFacts(NamedTuple):
    """What one rank was told.

    Attributes:
        counters: What changes with every step, such as the number of the update.
        alike: What must be alike.
        looking: Hooks that see whole gradients, which may differ if they only look.
    """

    counters: Words
    alike: Words
    looking: Words

    @property
    def digest(self) -> int:
        """32 bits, of which differences between ranks do not depend on the counters if equal."""
        own = zlib.crc32(repr((self.alike, self.looking)).encode())
        return own ^ zlib.crc32(repr(self.counters).encode())


class DifferingFact(NamedTuple):
    """A fact in which ranks differ: its name, and each value with the ranks that have it."""

    name: str
    values: Sequence[tuple[str, Sequence[int]]]

    def __str__(self) -> str:
        told = ", ".join(f"{value} on {ranks_in_words(ranks)}" for value, ranks in self.values)
        return f"{self.name}: {told}"


def differences(words: Sequence[Words]) -> list[DifferingFact]:
    """The facts in which ranks differ, in the order in which ranks name them.

    Args:
        words: Of each rank, by rank.
    """
    found = []
    for name in dict.fromkeys(name for of_rank in words for name in of_rank):
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(words):
            ranks.setdefault(of_rank.get(name) or _unsaid(name), []).append(rank)
        if len(ranks) > 1:
            found.append(DifferingFact(name, list(ranks.items())))
    return found


def value_in_words(value: Any) -> str:
    """A value as it is compared: numbers by their value, whatever type they have."""
    if isinstance(value, bool | str) or value is None:
        return str(value)
    try:
        number = float(value)
        return f"{number:.0f}" if number.is_integer() else repr(number)
    except (TypeError, ValueError, OverflowError):
        return repr(value)


def _unsaid(name: str) -> str:
    """What a fact is on a rank that does not name it."""
    if name.startswith("update rule"):
        return "enabled"
    return "the optimizer's" if name.startswith("hyperparameters") else "none"
