"""The protocol of the collectives that a sharded step needs, and the arithmetic that they share.

A reduce-scatter hands its result over piece by piece: while one piece is in flight, the piece
before it is summed and consumed (updated, or stored) out of the cache. No rank ever holds a second
array of the gradients' size, and a gradient is sent from where it lies if the piece covers one
contiguous range of it.

The sum of a piece is always formed in the order of the ranks, whoever owns it and whenever its
parts arrive: results depend on the gradients and the world size alone.
"""

from __future__ import annotations

import abc
import collections
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from smorms3_dist.layout import Bucket, GroupLayout, Piece

import numpy as np

PIECE_BYTES = 256 * 1024
"""What a rank has in flight of one piece, summed over its peers. Small enough to stay in a core's
L2 cache."""

SMALLEST_PIECE_BYTES = 16 * 1024
"""Below this, the cost of a message outweighs its bytes."""

Read = Callable[[int, Piece, np.ndarray], np.ndarray]
"""``read(owner, piece, scratch)``: this rank's gradients of a piece of the owner's shard, as a
contiguous array; a view where that is possible, else packed into ``scratch``, which is of the
piece's size."""

Consume = Callable[[Piece, np.ndarray], None]
"""``consume(piece, mean)``: takes the mean of one piece of this rank's own shard; ``mean`` is valid
during the call and may be written to, except at world size 1, where it may be the gradient
itself."""


class Collectives(abc.ABC):
    """What the ranks of a job do together.

    Every method except the constructor is collective: all ranks call it in the same order with
    arguments that agree.

    Attributes:
        rank: This rank.
        size: World size.
        bytes_sent: Bytes that this rank has sent to its peers so far, by operation
            (``reduce_scatter``, ``all_gather``, ``broadcast``).
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.bytes_sent: collections.Counter[str] = collections.Counter()
        self._piece_cuts: weakref.WeakKeyDictionary[GroupLayout, tuple[tuple[Piece, ...], ...]] = (
            weakref.WeakKeyDictionary()
        )

    @abc.abstractmethod
    def reduce_scatter(self, group: GroupLayout, read: Read, consume: Consume) -> None:
        """Averages the gradients of a group over the ranks; each rank receives its own shard.

        Args:
            group: The layout, the same on all ranks.
            read: Gives this rank's gradients of a piece of any owner's shard.
            consume: Takes the mean of each piece of this rank's shard, in order.
        """

    @abc.abstractmethod
    def all_gather(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        """Gives every rank the parts that the others own of a flat buffer, in place.

        Args:
            flat: The flat buffer of a group, one-dimensional and contiguous.
            buckets: Its buckets.
        """

    @abc.abstractmethod
    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """Overwrites a contiguous array with that of ``root``."""

    @abc.abstractmethod
    def all_reduce_or(self, flags: int) -> int:
        """Returns the bitwise or of the flags of all ranks (a non-negative integer below 2**31)."""

    @abc.abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns the (small, picklable) values of all ranks, by rank."""

    def piece_limit(self, dtype: np.dtype) -> int:
        """Elements of the largest piece, the same on all ranks."""
        share = PIECE_BYTES // max(self.size - 1, 1)
        return max(share, SMALLEST_PIECE_BYTES) // dtype.itemsize

    def pieces(self, group: GroupLayout) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of every rank's shard, by rank; computed once for a layout."""
        cuts = self._piece_cuts.get(group)
        if cuts is None:
            limit = self.piece_limit(group.dtype)
            cuts = tuple(shard.pieces(limit) for shard in group.shards)
            self._piece_cuts[group] = cuts
        return cuts


class Mean:
    """The mean of a piece over the ranks, with memory for one piece.

    Sums in the order of the ranks and multiplies by 1/size, as ChainerMN's naive communicator does;
    float16 is summed and scaled in float32 before it is rounded once, so that a mean in range never
    overflows on the way.

    Args:
        dtype: The dtype of the gradients.
        size: World size.
        limit: Elements of the largest piece.
    """

    def __init__(self, dtype: np.dtype, size: int, limit: int) -> None:
        self._sum_dtype = np.dtype(np.float32) if dtype == np.float16 else dtype
        self._scale = self._sum_dtype.type(1.0 / size)
        self._sum = np.empty(limit if size > 1 else 0, self._sum_dtype)
        self._mean = self._sum if self._sum_dtype == dtype else np.empty_like(self._sum, dtype)

    def __call__(self, contributions: Sequence[np.ndarray]) -> np.ndarray:
        """Averages one piece.

        Args:
            contributions: The piece of each rank, by rank; arrays of one length.

        Returns:
            The mean, valid until the next call; the contribution itself if there is only one.
        """
        first = contributions[0]
        if len(contributions) == 1:
            return first
        # A non-finite gradient is the business of the loss scale or of the user's hooks, as in
        # ChainerMN.
        with np.errstate(all="ignore"):
            total = self._sum[: first.size]
            np.add(first, contributions[1], out=total, dtype=self._sum_dtype)
            for contribution in contributions[2:]:
                np.add(total, contribution, out=total, dtype=self._sum_dtype)
            return np.multiply(
                total, self._scale, out=self._mean[: first.size], casting="same_kind"
            )
