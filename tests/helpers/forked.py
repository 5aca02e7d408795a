"""Ranks that are processes forked from one, for tests that need real ones and many starts.

They come without MPI, whose start takes a second, and die as MPI's ranks do: where one fails, the
others are killed.
"""

from __future__ import annotations

import functools
import itertools
import operator
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
    """Forks ranks that call a function with their collectives, and waits for their end.

    Returns:
        How they have ended, by rank: exit statuses, or signals as negative numbers.
    """
    ends: dict[int, dict[int, Connection]] = {rank: {} for rank in range(size)}
    for low, high in itertools.combinations(range(size), 2):
        ends[low][high], ends[high][low] = Pipe()
    sys.stdout.flush()
    pids = []
    for rank in range(size):
        pids.append(os.fork())
        if pids[-1] == 0:
            _be_rank(rank, ends, function)
    for end in itertools.chain.from_iterable(mine.values() for mine in ends.values()):
        end.close()
    statuses: dict[int, int] = {}
    while len(statuses) < size:
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if status != 0 and len(statuses) == 1 + list(statuses.values()).count(0):
            for other in set(pids) - statuses.keys():
                os.kill(other, signal.SIGKILL)
    return [statuses[pid] for pid in pids]


def _be_rank(
    rank: int,
    ends: Mapping[int, Mapping[int, Connection]],
    function: Callable[[PipeCollectives], None],
) -> None:
    status = 1
    try:
        for other in ends.keys() - {rank}:
            for end in ends[other].values():
                end.close()
        function(PipeCollectives(rank, len(ends), ends[rank]))
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
        limit = self.piece_limit(group.dtype)
        pieces = self.pieces(group)
        scratch = np.empty(limit, gradients.dtype)
        mine = [
            [np.array(gradients.read_piece(owner, piece, scratch[: piece.size])) for piece in cuts]
            for owner, cuts in enumerate(pieces)
        ]
        everybodys = self.all_gather_object(mine)
        reduce = Reducer(group.dtype, self.size, limit)
        for index, piece in enumerate(pieces[self.rank]):
            consume(piece, reduce([theirs[self.rank][index] for theirs in everybodys]))

    def all_gather(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        for rank, theirs in enumerate(self.all_gather_object(flat)):
            for bucket in buckets if rank != self.rank else ():
                part_f = bucket.part_of(rank)
                flat[part_f] = theirs[part_f]

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        array[...] = self.all_gather_object(array)[root]

    def all_reduce_or(self, flags: int) -> int:
        return functools.reduce(operator.or_, self.all_gather_object(flags))
