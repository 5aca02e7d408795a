"""What ranks agree on before each step: flags, and a digest of what has to be alike.

Ranks that take different ways through a step would wait for each other for ever, or each would
train its part of the model in its own way. So before each step they exchange one word: flags, of
which one rank's is enough for all, and a digest of the facts that have to be the same. So they do
before whatever else they do together. A rank whose script has ended takes part once more, so that
the others learn of it.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from smorms3_dist.collectives.base import LEFT, Collectives
from smorms3_dist.step.facts import SharedFacts, differences
from smorms3_dist.waiting import Wait
from smorms3_dist.wording import ranks_in_words


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
    """This rank does something else, together with all others."""

    WATCHED = 1 << 54
    """This rank has watched its backward pass: it knows the order in which gradients become final;
    or, where the ranks have agreed on one, it has handed gradients over already."""

    AGAIN = 1 << 55
    """What this rank has handed over during the backward pass, if anything, is not to be used."""

    ASKED_TO_END = 1 << 56
    """This rank is asked to save a checkpoint and to end."""

    NO_MORE_BATCHES = 1 << 58
    """This rank makes no more steps."""

    ENDS = 1 << 59
    """The Trainer of this rank would end here."""

    WANTED = ENDS
    """On other occasions, and before a step: this rank wants what it alone decides."""

    SCALED = 1 << 60
    """Gradients of this rank have been multiplied by the optimizer's loss scale."""

    NOT_FINITE = 1 << 61
    """A gradient of this rank is infinite or nan, and somebody wants to know."""

    WRITTEN = 1 << 62
    """Somebody has written to parameters of this rank since the last update."""


NO_FLAGS = Flag(0)

REMEDY = (
    "To save whole states, use smorms3_dist.extensions.snapshot, or call optimizer.consolidate() on"
    " all ranks before one of them saves; smorms3_dist.ShardedCheckpoint saves shards and loads "
    "them at any world size"
)
"""What to do about states of one shard where whole ones are needed."""

EVENLY = (
    "Give all ranks equal numbers of batches, and the same end of training: "
    "chainermn.scatter_dataset(..., force_equal_length=True), iterators with repeat=True; or let "
    "training end where the first rank does, with uneven='stop'"
)
"""What to do about ranks that end before others."""

_NO_MORE = "has no more batches"

# The word, an integer of which all-reduce forms the bitwise or:
#
#     bit  62 ........ 58     57    56 .... 54   53 .......... 31   30 ............ 8   7 ........ 0
#               Flag         LEFT      Flag      digest, inverted          digest           Flag
#                                                   (23 bits)            (23 bits)
#
# Two ranks have different digests exactly if, in the or of all words, some bit of the digest is set
# and the same bit of the inverted digest, too.
_DIGEST_BITS = 23
_DIGEST = (1 << _DIGEST_BITS) - 1
_DIGEST_AT = 8
_INVERTED_AT = _DIGEST_AT + _DIGEST_BITS
_TOLD = 3
"""How many differences an error tells."""

_FLAGS = 0xFF | sum(flag for flag in Flag if flag >= Flag.WATCHED)


class Background(Protocol):
    """What goes on beside the training, and communicates only between steps."""

    def flags(self) -> Flag:
        """`Flag.BUSY` or `Flag.FAILED` as it stands on this rank, `Flag.WANTED`, or none."""

    def proceed(self, flags: Flag) -> None:
        """Goes on. Collective."""


class NoMoreBatches(Exception):
    """Ends a training with ``uneven='stop'`` on all ranks, because one of them makes no more steps.

    All of them have made as many updates then.
    """


class DifferError(RuntimeError):
    """Ranks have come to an update together, but differ in what they must share: all raise this.

    Attributes:
        flags: Those that any rank has raised.
        names: The facts in which they differ, but for what has been saved and loaded.
    """

    def __init__(self, message: str, flags: Flag, names: frozenset[str]) -> None:
        super().__init__(message)
        self.flags = flags
        self.names = names


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
    stop: bool = False,
) -> Agreement:
    """Exchanges what the ranks know. Collective.

    Args:
        flags: What this rank tells the others.
        facts: What it was told.
        snapshots: What has been saved and loaded since the last step, in words, which has to be
            alike, too.
        collectives: Reaches the other ranks.
        tolerated: Of the last agreement.
        stop: Whether training ends here, and well, if a rank makes no more steps.

    Raises:
        DifferError: If ranks differ in a fact, saying in which, and how.
        RuntimeError: If some do something else instead, or have ended.
        NoMoreBatches: In the place of the last, if ``stop``.
    """
    digest = (facts.digest ^ zlib.crc32(repr(snapshots).encode())) & _DIGEST
    occasion = f"update {collectives.wait.updates + 1}"
    word = _come_together(flags | Flag.IN_STEP, digest, occasion, collectives, stop)
    collectives.wait.updates += 1
    differing = _differing(word)
    looking: tuple[str, ...] = ()
    if differing and differing != tolerated:
        # As the words, whichever optimizer of the communicator each rank is in.
        everybodys_snapshots = collectives.exchange_note(snapshots)
        everybodys = [SharedFacts(*other) for other in collectives.exchange_note(tuple(facts))]
        try:
            _compare_snapshots(everybodys_snapshots)
            _raise_differences(everybodys)
        except RuntimeError as error:
            names = frozenset(fact.name for fact in differences([f.alike for f in everybodys]))
            raise DifferError(str(error), Flag(word & _FLAGS), names) from None
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


def meet(collectives: Collectives, occasion: str, flags: Flag = NO_FLAGS) -> Flag:
    """Lets all ranks come together between two steps; returns what any has raised. Collective.

    Args:
        collectives: Reaches the other ranks.
        occasion: What for, alike on all ranks, such as ``the save of step 5``.
        flags: What this rank tells the others.

    Raises:
        RuntimeError: If other ranks make a step instead, or do something else, or have ended.
    """
    digest = zlib.crc32(occasion.encode()) & _DIGEST
    word = _come_together(flags | Flag.BETWEEN_STEPS, digest, occasion, collectives)
    return Flag(word & _FLAGS)


def end_training(collectives: Collectives) -> bool:
    """Waits until the others come to their next step, or end as well, and learn that this rank has.

    Collective, with whatever the others come to.

    Returns:
        Whether others have come to a step.
    """
    word = _come_together(Flag.NO_MORE_BATCHES, 0, "the end of training", collectives)
    return bool(word & Flag.IN_STEP)


def _come_together(
    flags: Flag, digest: int, occasion: str, collectives: Collectives, stop: bool = False
) -> int:
    """Exchanges a word; returns only if all ranks are there on the same occasion."""
    wait = collectives.wait
    if wait.gone:
        raise RuntimeError(f"{wait.gone}, while rank {collectives.rank} is in {occasion}. {EVENLY}")
    wait.occasion = occasion
    mine = int(flags) | digest << _DIGEST_AT | (digest ^ _DIGEST) << _INVERTED_AT
    word = collectives.exchange_word(mine)
    kinds = word & (Flag.IN_STEP | Flag.BETWEEN_STEPS | Flag.NO_MORE_BATCHES | LEFT)
    alike = kinds in (Flag.IN_STEP, Flag.NO_MORE_BATCHES) or (
        kinds == Flag.BETWEEN_STEPS and not _differing(word)
    )
    if alike:
        return word
    ended = Flag.NO_MORE_BATCHES in flags
    note = f"{_NO_MORE} after {wait.updates} updates" if ended else f"is in {occasion}"
    notes = collectives.exchange_note(note)
    wait.gone = _words_of(notes, (Wait.ENDED,))
    if ended:
        return word
    gone = _words_of(notes, (Wait.ENDED, _NO_MORE))
    there = _words_of(notes, ("is in",))
    if not gone:
        raise RuntimeError(
            f"the ranks do different things: {there}. What all ranks do together, all have to "
            "come to in the same order: extend the trainer with checkpoints and snapshots on all "
            "ranks, with the same trigger; give all equal numbers of batches; and call nothing of "
            "it within `if comm.rank == 0`"
        )
    if stop and kinds & Flag.BETWEEN_STEPS == 0:
        raise NoMoreBatches(f"{gone}, while {there}: training ends")
    raise RuntimeError(f"{gone}, while {there}. {EVENLY}")


def _words_of(notes: Sequence[str], kinds: tuple[str, ...]) -> str:
    """The notes that begin in one of these ways, each with the ranks that have it, in words."""
    ranks: dict[str, list[int]] = {}
    for rank, note in enumerate(notes):
        if note.startswith(kinds):
            ranks.setdefault(note, []).append(rank)
    return ", ".join(_sentence(theirs, note) for note, theirs in ranks.items())


def _sentence(ranks: Sequence[int], note: str) -> str:
    if len(ranks) > 1:
        verb, _, rest = note.partition(" ")
        several = {"is": "are", "has": "have"}[verb]
        note = f"{several} {rest.replace('its script', 'their scripts')}"
    return f"{ranks_in_words(ranks)} {note}"


def _differing(word: int) -> int:
    """The bits in which the ranks' digests differ."""
    return word >> _DIGEST_AT & word >> _INVERTED_AT & _DIGEST


def _compare_snapshots(snapshots: Sequence[tuple[str, ...]]) -> None:
    for rank, other in enumerate(snapshots):
        if other != snapshots[0]:
            here, there = (", and ".join(s) or "has done nothing" for s in (snapshots[0], other))
            raise RuntimeError(
                f"since the last step rank 0 {here}, but rank {rank} {there}. Do the same on all "
                f"ranks; a shard that not all ranks save is of no use. {REMEDY}"
            )
