"""What ranks agree on before each step: flags, and a digest of what has to be alike.

Ranks that take different ways through a step would wait for each other for ever, or each would
train its part of the model in its own way. So before each step they exchange one word: flags, of
which one rank's is enough for all, and a digest of the facts that have to be the same.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.step.facts import SharedFacts, differences


class Flag(enum.IntFlag):
    """What one rank tells all the others before a step."""

    LAY_OUT = 1
    """The model, or how it is updated, has changed since the last step, or there was none."""

    BROADCAST = 2
    """Parameters have to be broadcast."""

    STEP = 4
    """A step is made after a broadcast, too."""

    WHOLE_GRADIENTS = 8
    """Somebody needs whole gradients."""

    BUSY = 16
    """Something in the background has not come to its end."""

    FAILED = 32
    """Something in the background has failed."""

    IN_STEP = 64
    """This rank makes a step."""

    BETWEEN_STEPS = 128
    """This rank saves or loads, together with all others."""

    ASKED_TO_END = 1 << 56
    """This rank is asked to save a checkpoint and to end."""

    SCALED = 1 << 57
    """Gradients of this rank have been multiplied by the optimizer's loss scale."""

    NOT_FINITE = 1 << 58
    """A gradient of this rank is infinite or nan, and somebody wants to know."""

    AT_END = 1 << 59
    """This rank has come to the end of its training."""

    WRITTEN = 1 << 60
    """Somebody has written to parameters of this rank since the last update."""


NO_FLAGS = Flag(0)

REMEDY = (
    "To save whole states, use smorms3_dist.extensions.snapshot, or call optimizer.consolidate() on"
    " all ranks before one of them saves; smorms3_dist.ShardedCheckpoint saves shards and loads "
    "them at any world size"
)
"""What to do about states of one shard where whole ones are needed."""

# The word, an integer of which all-reduce forms the bitwise or:
#
#     bit   60 ........ 56     55 .......... 32   31 ............ 8   7 ........ 0
#                Flag        digest, inverted          digest           Flag
#                               (24 bits)            (24 bits)
#
# Two ranks have different digests exactly if, in the or of all words, some bit of the digest is set
# and the same bit of the inverted digest, too.
_DIGEST_BITS = 24
_DIGEST = (1 << _DIGEST_BITS) - 1
_DIGEST_AT = 8
_INVERTED_AT = _DIGEST_AT + _DIGEST_BITS
_TOLD = 3
"""How many differences an error tells."""

_FLAGS = 0xFF | sum(flag for flag in Flag if flag >= Flag.ASKED_TO_END)


class Background(Protocol):
    """What goes on beside the training, and communicates only between steps."""

    def flags(self) -> Flag:
        """`Flag.BUSY` or `Flag.FAILED` as it stands on this rank, or none."""

    def proceed(self, flags: Flag) -> None:
        """Goes on. Collective."""


class Agreement(NamedTuple):
    """What all ranks make of a step.

    Attributes:
        flags: Those that any rank has raised.
        tolerated: The bits of the digests in which ranks differ, if they differ in hooks that may
            be looking only; else 0.
        looking: These hooks, in words, where they have just been found.
    """

    flags: Flag
    tolerated: int = 0
    looking: tuple[str, ...] = ()


def agree(
    flags: Flag,
    facts: SharedFacts,
    snapshots: tuple[str, ...],
    collectives: Collectives,
    tolerated: int = 0,
) -> Agreement:
    """Exchanges what the ranks know. Collective.

    Args:
        flags: What this rank tells the others.
        facts: What it was told.
        snapshots: What has been saved and loaded since the last step, in words, which has to be
            alike, too.
        collectives: Reaches the other ranks.
        tolerated: Of the last agreement.

    Raises:
        RuntimeError: If ranks differ in a fact, saying in which, and how.
    """
    digest = (facts.digest ^ zlib.crc32(repr(snapshots).encode())) & _DIGEST
    word = int(flags | Flag.IN_STEP) | digest << _DIGEST_AT | (digest ^ _DIGEST) << _INVERTED_AT
    word = collectives.all_reduce_or(word)
    _check_occasion(word)
    differing = word >> _DIGEST_AT & word >> _INVERTED_AT & _DIGEST
    looking: tuple[str, ...] = ()
    if differing and differing != tolerated:
        _compare_snapshots(collectives.all_gather_object(snapshots))
        everybodys = [SharedFacts(*other) for other in collectives.all_gather_object(tuple(facts))]
        _raise_differences(everybodys)
        looking = tuple(map(str, differences([other.looking for other in everybodys])))
    return Agreement(Flag(word & _FLAGS), differing, looking)


def _raise_differences(facts: Sequence[SharedFacts]) -> None:
    found = differences([other.counters for other in facts])
    found += differences([other.alike for other in facts])
    if not found:
        return
    told = "; ".join(map(str, found[:_TOLD]))
    more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    raise RuntimeError(
        f"the ranks differ in what they must share: {told}{more}. Each rank would train its "
        "part of the model in another way: tell all ranks the same, the same number of times, from "
        "values that all of them have"
    )


def meet(collectives: Collectives, flags: Flag = NO_FLAGS) -> Flag:
    """Lets all ranks come together to save or to load; returns what any has raised. Collective.

    Raises:
        RuntimeError: If other ranks make a step instead.
    """
    word = collectives.all_reduce_or(int(flags | Flag.BETWEEN_STEPS))
    _check_occasion(word)
    return Flag(word & _FLAGS)


def _check_occasion(word: int) -> None:
    if word & Flag.IN_STEP and word & Flag.BETWEEN_STEPS and word & Flag.AT_END:
        raise RuntimeError(
            "some ranks have come to the end of their training, while others make a step: give all "
            "ranks equally many batches (scatter_dataset(..., force_equal_length=True), "
            "repeat=True), and the same end of the training"
        )
    if word & Flag.IN_STEP and word & Flag.BETWEEN_STEPS:
        raise RuntimeError(
            "some ranks save or load a checkpoint or a snapshot, or call check_sync(), while "
            "others make a step: all ranks have to do it together. Extend the trainer with it on "
            "all ranks, with the same trigger"
        )


def _compare_snapshots(snapshots: Sequence[tuple[str, ...]]) -> None:
    for rank, other in enumerate(snapshots):
        if other != snapshots[0]:
            here, there = (", and ".join(s) or "has done nothing" for s in (snapshots[0], other))
            raise RuntimeError(
                f"since the last step rank 0 {here}, but rank {rank} {there}. Do the same on all "
                f"ranks; a shard that not all ranks save is of no use. {REMEDY}"
            )
