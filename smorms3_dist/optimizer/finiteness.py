"""What is said of gradients that are not finite, alike on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.optimizer.sync import in_words, listed
from smorms3_dist.sharding.own_gradients import NotFinite


class NotFiniteReport(NamedTuple):
    """What the ranks have found.

    Attributes:
        names: The parameters whose gradients are not finite, on any rank.
        words: What is to be said.
        fatal: Whether any rank wants an error.
    """

    names: tuple[str, ...]
    words: str
    fatal: bool


def report_not_finite(
    mine: Sequence[NotFinite], mode: str, t: int, collectives: Collectives
) -> NotFiniteReport | None:
    """Brings together what each rank has found in its own gradients. Collective.

    ``mode`` is what this rank was told to do.
    """
    everybodys = collectives.all_gather_object((mode, [tuple(each) for each in mine]))
    ranks: dict[str, list[int]] = {}
    first: tuple[str, str] | None = None
    for rank, (_, theirs) in enumerate(everybodys):
        for name, count, size in theirs:
            ranks.setdefault(name, []).append(rank)
            first = first or (name, f"{count:,} of {size:,} elements on rank {rank}")
    if first is None:
        return None
    name, elements = first
    others = [f"{each} on {in_words(on)}" for each, on in ranks.items() if each != name]
    more = f", and {len(others)} more: {listed(others)}" if others else ""
    fatal = any(each == "error" for each, _ in everybodys)
    outcome = "Nothing has been updated" if fatal else "The mean brings them to all ranks"
    words = (
        f"gradients are not finite in the step after t = {t}: that of {name} on "
        f"{in_words(ranks[name])} ({elements}){more}. {outcome}. Look at the data and the loss of "
        "that rank, lower the learning rate, or leave such steps out by dynamic loss scaling: "
        "optimizer.loss_scaling()"
    )
    return NotFiniteReport(tuple(sorted(ranks)), words, fatal)
