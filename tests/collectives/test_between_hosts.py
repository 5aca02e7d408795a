"""Exchanges between hosts: small messages, the same results, and each part but once into a host."""

from __future__ import annotations

import functools
import sys
import types

from smorms3_dist.collectives import between_hosts
from smorms3_dist.collectives.between_hosts import Hosts, gather_hostwise, sent_by
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import FlatLayout, ParameterSpec, Piece

import collective_checks
import numpy as np
import pytest
import thread_messages
from thread_messages import ThreadComm

MESSAGE_BYTES = 12
LIMIT = 32

SIZES = [0, 1, 3, 7]
SIZES += [boundary + more for boundary in (MESSAGE_BYTES, LIMIT, 3 * LIMIT) for more in (-1, 0, 1)]

WORLDS = [
    [0, 1],
    [0, 0],
    [0, 0, 1],
    [0, 1, 2],
    [0, 0, 1, 1],
    [0, 1, 0, 1],
    [4, 4, 4, 2],
    [0, 1, 1, 2, 2],
]


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No MPI library, but threads, and messages of a few bytes."""
    request = types.SimpleNamespace(Waitall=thread_messages.waitall)
    library = types.SimpleNamespace(BYTE=None, Request=request)
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=library))
    monkeypatch.setattr(between_hosts, "MESSAGE_BYTES", MESSAGE_BYTES)
    monkeypatch.setattr(between_hosts, "HANDED_ON_BYTES", LIMIT)


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("world", WORLDS)
def test_means_are_the_same_in_small_messages(world: list[int], elements: int) -> None:
    from smorms3_dist.collectives.mpi import Exchange

    size, limit = len(world), LIMIT // 4
    group = FlatLayout([ParameterSpec("/p", (elements,), "float32")], size).groups[0]
    pieces = [shard.pieces(limit) for shard in group.shards]
    grads = [np.linspace(rank + 1, 1e-3, elements, dtype=np.float32) for rank in range(size)]
    expected = functools.reduce(np.add, grads) * np.float32(1 / size)
    found = np.full(elements, np.nan, np.float32)

    def reduce(comm: ThreadComm) -> None:
        def consume(piece: Piece, mean: Mean) -> None:
            (segment,) = piece.segments
            found[segment.range_p] = mean.evaluated()[: segment.size]

        hosts = Hosts(world, comm.rank)
        exchange = Exchange(comm, group.dtype, limit, hosts=hosts)  # type: ignore
        exchange.run(pieces, collective_checks.Gradients([grads[comm.rank]]), consume)

    wires = thread_messages.run_ranks(size, reduce)
    np.testing.assert_array_equal(found, expected)
    for (sender, receiver), sizes in wires.arrived.items():
        largest = max(piece.size * 4 for piece in pieces[receiver])
        is_inside = world[sender] == world[receiver]
        assert max(sizes) == (largest if is_inside else min(largest, MESSAGE_BYTES))


@pytest.mark.parametrize("world", WORLDS)
def test_each_part_enters_a_host_once_and_everybody_has_it(world: list[int]) -> None:
    size = len(world)
    for nbytes in SIZES:
        whole = np.arange(size * nbytes, dtype=np.uint8).reshape(size, nbytes)
        sent = {}

        def run(comm: ThreadComm, nbytes=nbytes, whole=whole, sent=sent) -> None:
            parts = np.zeros_like(whole)
            parts[comm.rank] = whole[comm.rank]
            hosts = Hosts(world, comm.rank)
            gather = gather_hostwise(comm, hosts, parts, thread_messages.waitall)  # type: ignore
            sent[comm.rank] = sent_by(gather)
            np.testing.assert_array_equal(parts, whole)
            # What is asked of others is under way before any answer to them.
            own = -(-nbytes // LIMIT) * len(hosts.entries + hosts.here)
            assert comm.posted[:own] == ["send"] * own

        wires = thread_messages.run_ranks(size, run)
        entered = 0
        for (sender, receiver), sizes in wires.arrived.items():
            sent[sender] -= sum(sizes)
            if world[sender] != world[receiver]:
                entered += sum(sizes)
        assert not any(sent.values()), "what is sent is counted"
        assert entered == nbytes * size * (len(set(world)) - 1)


def test_the_ranks_of_a_host_share_what_enters() -> None:
    for world in [0] * 3 + [1] * 3, [0, 1] * 3:
        assert [len(Hosts(world, rank).entering) for rank in range(6)] == [1] * 6
    assert [Hosts([0, 0, 0, 1, 1], rank).entering for rank in (3, 4)] == [[0, 2], [1]]
    assert Hosts([7, 7, 7], 1).are_one and not Hosts([7, 7, 8], 1).are_one
