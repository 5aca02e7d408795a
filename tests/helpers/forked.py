"""Ranks that are processes forked from one, for tests that need real ones and many starts.

They come without MPI, whose start takes a second, and die as MPI's ranks do: where one fails, the
others are killed.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from smorms3_dist.collectives.base import Collectives, Consume, Gradients, Reducer
from smorms3_dist.layout import Bucket, GroupLayout

import numpy as np


def run_forked(size: int, function: Callable[[PipeCollectives], None]) -> list[int]:
    """Forks ranks, and waits for their end.

    Args:
        size: How many.
        function: Called in each with its collectives.

    Returns:
        How they have ended, by rank: exit statuses, or signals as negative numbers.
    """
    pairs = list(itertools.combinations(range(size), 2))
    ends = {}
    for low, high in pairs:
        ends[low, high], ends[high, low] = Pipe()
    sys.stdout.flush()
    pids = [_fork(rank, size, ends, function) for rank in range(size)]
    for end in ends.values():
        end.close()
    statuses: dict[int, int] = {}
    while len(statuses) < size:
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if status != 0 and len(statuses) == 1 + list(statuses.values()).count(0):
            for other in pids:
                if other not in statuses:
                    os.kill(other, signal.SIGKILL)
    return [statuses[pid] for pid in pids]


def _fork(
    rank: int,
    size: int,
    ends: Mapping[tuple[int, int], Connection],
    function: Callable[[PipeCollectives], None],
) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for (owner, _), end in ends.items():
            if owner != rank:
                end.close()
        function(PipeCollectives(rank, size, {b: end for (a, b), end in ends.items() if a == rank}))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class PipeCollectives(Collectives):
    """Collectives over a pipe between each two ranks; see `run_forked`."""

    def __init__(self, rank: int, size: int, peers: Mapping[int, Connection]) -> None:
        super().__init__(rank, size)
        self._peers = peers

    def all_gather_object(self, value: Any) -> list[Any]:
        """See `Collectives.all_gather_object`."""
        everybodys = [value] * self.size
        try:
            for peer, pipe in sorted(self._peers.items()):
                # The lower rank of two speaks first, so that nobody waits for ever.
                if self.rank < peer:
                    pipe.send(value)
                everybodys[peer] = pipe.recv()
                if self.rank > peer:
                    pipe.send(value)
        except (EOFError, OSError):
            # A rank has died. This one does nothing any more until it is killed, as MPI's are.
            threading.Event().wait()
        return everybodys

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `Collectives.reduce_scatter`."""
        limit = self.piece_limit(group.dtype)
        pieces = self.pieces(group)
        scratch = np.empty(limit, group.dtype)
        mine = [
            [np.array(gradients.read_piece(owner, piece, scratch[: piece.size])) for piece in cuts]
            for owner, cuts in enumerate(pieces)
        ]
        everybodys = self.all_gather_object(mine)
        reduce = Reducer(group.dtype, self.size, limit)
        for index, piece in enumerate(pieces[self.rank]):
            consume(piece, reduce([theirs[self.rank][index] for theirs in everybodys]))

    def all_gather(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.all_gather`."""
        for rank, theirs in enumerate(self.all_gather_object(flat)):
            for bucket in buckets if rank != self.rank else ():
                part_f = bucket.part_of(rank)
                flat[part_f] = theirs[part_f]

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """See `Collectives.broadcast`."""
        array[...] = self.all_gather_object(array)[root]

    def all_reduce_or(self, flags: int) -> int:
        """See `Collectives.all_reduce_or`."""
        result = 0
        for theirs in self.all_gather_object(flags):
            result |= theirs
        return result
