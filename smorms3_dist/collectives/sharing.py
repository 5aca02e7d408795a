"""Arrays that all ranks of a host share: each writes its own part, and all see it.

Nothing is sent within a host then. What ranks of other hosts own, one rank of each host receives,
straight into the array. Who has written waits for the others of its host before it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.collectives.between_hosts import Hosts
from smorms3_dist.device.memory_files import Offer, map_arrays
from smorms3_dist.layout import Bucket
from smorms3_dist.wording import ranks_in_words

import numpy as np


class CannotShareError(Exception):
    """Ranks of a host cannot share memory, on all ranks alike; says which ranks, and why."""


def share_on_hosts(collectives: Collectives, sizes: Sequence[int]) -> list[np.ndarray]:
    """Makes arrays of zeros that the ranks of a host share. Collective.

    Args:
        collectives: The ranks.
        sizes: Bytes of each array, alike on all ranks.

    Returns:
        uint8 arrays of these sizes.

    Raises:
        CannotShareError: If a rank cannot, on all ranks.
    """
    made: Offer | None = None
    told: object = None
    try:
        if collectives.hosts.is_first:
            made = Offer(sizes)
            told = made.file
    except OSError as error:
        told = str(error)
    arrays: list[np.ndarray] = []
    obstacle: str | None = None
    try:
        file = collectives.all_gather_object(told)[collectives.hosts.first]
        if isinstance(file, str):
            obstacle = file
        else:
            try:
                arrays = map_arrays(file, sizes)
                _touch(arrays, collectives.hosts)
            except OSError as error:
                obstacle = str(error)
        obstacles = collectives.all_gather_object(obstacle)
    finally:
        if made is not None:
            made.close()
    ranks = [rank for rank, each in enumerate(obstacles) if each is not None]
    if ranks:
        raise CannotShareError(f"{ranks_in_words(ranks)}: {obstacles[ranks[0]]}")
    return arrays


def _touch(arrays: Sequence[np.ndarray], hosts: Hosts) -> None:
    """Writes to this rank's part of zeros: memory lies near the core that writes to it first."""
    count = len(hosts.here) + 1
    for array in arrays:
        array[array.size * hosts.place // count : array.size * (hosts.place + 1) // count] = 0


def gather(
    collectives: Collectives, flat: np.ndarray, buckets: Sequence[Bucket], shared: bool
) -> None:
    """As `Collectives.all_gather`, where the ranks of a host may share the buffer. Collective."""
    if shared:
        collectives.enter_hosts(flat, buckets)
        collectives.meet_on_host()
    else:
        collectives.all_gather(flat, buckets)


def broadcast(collectives: Collectives, array: np.ndarray, shared: bool) -> None:
    """As `Collectives.broadcast` from rank 0, likewise. Collective."""
    if shared:
        collectives.broadcast_to_hosts(array)
        collectives.meet_on_host()
    else:
        collectives.broadcast(array)
