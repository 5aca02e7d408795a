"""What ranks agree on before each step: flags, and a digest of what has to be alike.

Ranks that take different ways through a step would wait for each other for ever. So before each
step they exchange one word: flags, of which one rank's is enough for all, and a digest of the hooks
that run on shards and of whatever else has to be the same.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from typing import Protocol

from smorms3_dist.collectives.base import Collectives


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
#     bit   60 .. 58  57   56    55 .......... 32   31 ............ 8   7 ........ 0
#             Flag     -  ASKED   digest, inverted          digest           Flag
#                                     (24 bits)            (24 bits)
#
# Two ranks have different digests exactly if, in the or of all words, some bit of the digest is set
# and the same bit of the inverted digest, too.
_DIGEST_BITS = 24
_DIGEST = (1 << _DIGEST_BITS) - 1
_DIGEST_AT = 8
_INVERTED_AT = _DIGEST_AT + _DIGEST_BITS
_FLAGS = 0xFF | Flag.ASKED_TO_END | Flag.NOT_FINITE | Flag.AT_END | Flag.WRITTEN


class Background(Protocol):
    """What goes on beside the training, and communicates only between steps."""

    def flags(self) -> Flag:
        """`Flag.BUSY` or `Flag.FAILED` as it stands on this rank, or none."""

    def proceed(self, flags: Flag) -> None:
        """Goes on. Collective."""


def agree(
    flags: Flag, program: tuple[str, ...], snapshots: tuple[str, ...], collectives: Collectives
) -> Flag:
    """Exchanges what the ranks know. Collective.

    Args:
        flags: What this rank tells the others.
        program: What has to be alike on all ranks, in words.
        snapshots: What has been saved and loaded since the last step, in words; likewise.
        collectives: Reaches the other ranks.

    Returns:
        The flags that any rank has raised.

    Raises:
        RuntimeError: If ranks would take different ways through the step, saying how they differ.
    """
    alike = program + snapshots
    digest = zlib.crc32(repr(alike).encode()) & _DIGEST if alike else 0
    word = int(flags | Flag.IN_STEP) | digest << _DIGEST_AT | (digest ^ _DIGEST) << _INVERTED_AT
    word = collectives.all_reduce_or(word)
    _check_occasion(word)
    if word >> _DIGEST_AT & word >> _INVERTED_AT & _DIGEST:
        _compare_snapshots(collectives.all_gather_object(snapshots))
        programs = collectives.all_gather_object(alike)
        rank = next(r for r, other in enumerate(programs) if other != programs[0])
        raise RuntimeError(
            f"the ranks would take different ways through this step: rank 0 has "
            f"{_words(programs[0], programs[rank])}, which rank {rank} has not, and rank {rank} has"
            f" {_words(programs[rank], programs[0])}. Configure hooks, loss scaling and model alike"
            " on every rank"
        )
    return Flag(word & _FLAGS)


def meet(collectives: Collectives, flags: Flag = NO_FLAGS) -> Flag:
    """Lets all ranks come together to save or to load; returns what any has raised. Collective.

    Raises:
        RuntimeError: If other ranks make a step instead.
    """
    word = collectives.all_reduce_or(int(flags | Flag.BETWEEN_STEPS))
    _check_occasion(word)
    return Flag(word & _FLAGS)


def _check_occasion(word: int) -> None:
    if word & Flag.IN_STEP and word & Flag.AT_END:
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


def _words(program: tuple[str, ...], other: tuple[str, ...]) -> str:
    return ", ".join(entry for entry in program if entry not in other) or "nothing more"
