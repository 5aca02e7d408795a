"""What goes from host memory to other ranks in a narrow dtype.

Each rank rounds what it has, its own part of a mean included: so results depend on the gradients
and the world size alone, and not on which rank owns what. Sums are formed in the wide dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

from smorms3_dist.collectives.base import Collectives, GatherChannel, Gradients
from smorms3_dist.kernels.narrow import SENT_AS, narrow, widen
from smorms3_dist.layout import Bucket, Piece

import numpy as np

GATHERED_BYTES = 1 << 22
"""What is gathered at once, of all ranks together: it stays in a cache until it is widened."""


def check_dtype(option: str, dtype: str | None) -> None:
    """Raises ValueError, naming the option, if nothing can be sent in a dtype."""
    if dtype is not None and dtype not in SENT_AS:
        raise ValueError(f"{option} must be None or one of {', '.join(SENT_AS)}, not {dtype!r}")


class NarrowGradients:
    """A rank's gradients as they are sent: see `smorms3_dist.collectives.base.Gradients`."""

    def __init__(self, gradients: Gradients, dtype: np.dtype) -> None:
        self._gradients = gradients
        self.dtype = dtype

    def read_piece(self, owner: int, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        """See `Gradients.read_piece`; always in ``scratch``."""
        packed = np.empty(piece.size, self._gradients.dtype)
        narrow(self._gradients.read_piece(owner, piece, packed), scratch)
        return scratch

    def pack_bucket(self, bucket: Bucket, out: np.ndarray, scale: float) -> None:
        """See `Gradients.pack_bucket`; collectives on host memory read pieces."""
        raise NotImplementedError("collectives on host memory read pieces")


def all_gather_narrow(
    collectives: Collectives | GatherChannel,
    flat: np.ndarray,
    buckets: Sequence[Bucket],
    dtype: np.dtype,
    shared: bool = False,
) -> None:
    """As `Collectives.all_gather`, but all parts become values of a narrow dtype, the own one too.

    Where the ranks of a host share the flat buffer, it is as `gather_shared`. Collective. Takes
    `GATHERED_BYTES` of memory.
    """
    exchange, here = collectives.all_gather, list(range(collectives.size))
    if shared:
        assert isinstance(collectives, Collectives)
        exchange, here = collectives.enter_hosts, [collectives.rank, *collectives.hosts.entering]
    size = collectives.size
    limit = max(GATHERED_BYTES // dtype.itemsize // size, 1)
    # Parameters without elements have no buckets.
    largest = max((bucket.part_size for bucket in buckets), default=0)
    buffer = np.empty(size * min(limit, largest), dtype)
    for bucket in buckets:
        for start in range(0, bucket.part_size, limit):
            part_size = min(limit, bucket.part_size - start)
            sent = Bucket(0, size * part_size, part_size)
            parts = [flat[bucket.part_of(rank)][start:][:part_size] for rank in range(size)]
            gathered = buffer[: sent.size]
            narrow(parts[collectives.rank], gathered[sent.part_of(collectives.rank)])
            exchange(gathered, [sent])
            for rank in here:
                widen(gathered[sent.part_of(rank)], parts[rank])
    if shared:
        assert isinstance(collectives, Collectives)
        collectives.meet_on_host()
