"""Whether the gradients of all ranks are finite, and what is said if not, alike on all ranks."""

from __future__ import annotations

import logging
from typing import NamedTuple

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.device.memory import Memory
from smorms3_dist.sharding.model import ModelView
from smorms3_dist.sharding.own_gradients import OwnGradients, not_finite_gradients
from smorms3_dist.step.agreement import NO_FLAGS, Flag
from smorms3_dist.wording import listed, ranks_in_words

_logger = logging.getLogger(__name__)


class Finiteness:
    """Looks at this rank's gradients before a step, and speaks if any rank has found something."""

    def __init__(self) -> None:
        self._gradients = OwnGradients()
        self._warned_of: set[tuple[str, ...]] = set()

    def flags(self, model: ModelView, memory: Memory, sent: str | None = None) -> Flag:
        """`Flag.NOT_FINITE` if a gradient of this rank is not finite, as it is sent."""
        finite = self._gradients.are_finite(model, memory, sent)
        return NO_FLAGS if finite else Flag.NOT_FINITE

    def report(
        self,
        model: ModelView,
        mode: str,
        t: int,
        collectives: Collectives,
        sent: str | None = None,
    ) -> None:
        """Warns on rank 0, or raises, naming parameters and ranks. Collective.

        Args:
            model: The model with this rank's gradients.
            mode: What this rank was told to do: one of `CHECK_FINITE`.
            t: The optimizer's ``t``.
            collectives: The ranks.
            sent: The narrow dtype in which gradients are sent, if any.

        Raises:
            RuntimeError: If any rank was told to.
        """
        report = _bring_together(model, mode, t, collectives, sent)
        if report is None:
            return
        if report.fatal:
            raise RuntimeError(report.words)
        # Once for these parameters: a nan in a step is in all that follow.
        if collectives.rank == 0 and report.names not in self._warned_of:
            self._warned_of.add(report.names)
            _logger.warning(report.words)


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


def _bring_together(
    model: ModelView, mode: str, t: int, collectives: Collectives, sent: str | None
) -> NotFiniteReport | None:
    """Brings together what each rank has found in its own gradients. Collective."""
    mine = not_finite_gradients(model, sent)
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
    others = [f"{each} on {ranks_in_words(on)}" for each, on in ranks.items() if each != name]
    more = f", and {len(others)} more: {listed(others)}" if others else ""
    fatal = any(each == "error" for each, _ in everybodys)
    outcome = "Nothing has been updated" if fatal else "The mean brings them to all ranks"
    as_sent = f" as they are sent, in {sent}," if sent else ""
    words = (
        f"gradients are not finite{as_sent} in the step after t = {t}: that of {name} on "
        f"{ranks_in_words(ranks[name])} ({elements}){more}. {outcome}. Look at the data and the "
        "loss of that rank, lower the learning rate, or leave such steps out by dynamic loss "
        "scaling: optimizer.loss_scaling()"
    )
    return NotFiniteReport(tuple(sorted(ranks)), words, fatal)
