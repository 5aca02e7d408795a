"""The time of a step that ``smorms3-dist plan`` estimates, on a machine of round numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from smorms3_dist.layout import ParameterSpec
from smorms3_dist.plan import demand
from smorms3_dist.plan.setup import TRANSPORTS, Setup
from smorms3_dist.plan.times import Speeds, chainermn_times, times, update_bytes

import pytest

MACHINE = Speeds(inside=10e9, between=1e9, memory=100e9, latency=1e-3)


def simple(count: int, ranks: int, each: int, dtype: str = "float32", **how: Any) -> Setup:
    return Setup((ParameterSpec("/w", (count,), dtype),), ranks, each, **how)


def test_a_ring_takes_its_messages_and_its_bytes() -> None:
    # Two buckets: 6 messages one after the other; 3/4 of 128 MB at 10 GB/s, or 1 between nodes.
    setup = simple(1 << 25, 4, 4)
    nbytes = 3 / 4 * 4 * 2**25
    inside = times(setup, MACHINE)
    assert inside["reduce"] == inside["all_gather"] == pytest.approx(6e-3 + nbytes / 10e9)
    assert inside["gather_gradients"] == 0
    assert inside["pack"] == pytest.approx(2 * 4 * 2**25 / 100e9)
    setup = dataclasses.replace(setup, ranks_per_node=2)
    between = times(setup, MACHINE)
    assert between["reduce"] == between["all_gather"] == pytest.approx(6e-3 + nbytes / 1e9)
    halved = times(dataclasses.replace(setup, communication_dtype="bfloat16"), MACHINE)
    assert halved["reduce"] == pytest.approx(6e-3 + nbytes / 2e9)
    assert halved["all_gather"] == between["all_gather"]
    whole = times(dataclasses.replace(setup, gradients="replicated"), MACHINE)
    assert whole["gather_gradients"] == whole["all_gather"] == between["all_gather"]
    assert whole["total"] == pytest.approx(between["total"] + between["all_gather"])


def test_what_ranks_exchange_in_pairs_leaves_the_node_of_each() -> None:
    # 2 turns of up to 2 MiB / 3 from each of 3 peers; 4 MiB, of which 3/4 go to others in a node.
    nbytes = 4 * 2**20

    def of_nodes_of(ranks: int) -> dict[str, float]:
        return times(simple(1 << 20, 4, ranks, transport="host"), MACHINE)

    assert of_nodes_of(8)["reduce"] == pytest.approx(2 * 3 * 1e-3 + 3 / 4 * nbytes / 10e9)
    # Each of two ranks of a node sends half of it away, over one link.
    assert of_nodes_of(2)["reduce"] == pytest.approx(2 * 3 * 1e-3 + 2 / 2 * nbytes / 1e9)
    assert of_nodes_of(1)["reduce"] == pytest.approx(2 * 3 * 1e-3 + 3 / 4 * nbytes / 1e9)
    assert of_nodes_of(8)["pack"] == 0
    # Gathered parts of the other node enter once, and meanwhile are handed on.
    assert of_nodes_of(8)["all_gather"] == pytest.approx(3e-3 + 3 / 4 * nbytes / 10e9)
    assert of_nodes_of(2)["all_gather"] == pytest.approx(3e-3 + 2 / 4 * nbytes / 1e9)
    assert of_nodes_of(1)["all_gather"] == pytest.approx(3e-3 + 3 / 4 * nbytes / 1e9)
    # Where they are shared there is nothing to hand on.
    for here, expected in ((8, 2e-3), (2, 3e-3 + 2 / 4 * nbytes / 1e9)):
        setup = simple(1 << 20, 4, here, transport="host", share_parameters=True)
        assert times(setup, MACHINE)["all_gather"] == pytest.approx(expected)
    narrow = {"communication_dtype": "bfloat16", "gather_dtype": "float16"}
    halved = times(simple(1 << 20, 4, 2, transport="host", **narrow), MACHINE)
    assert halved["reduce"] == pytest.approx(2 * 3 * 1e-3 + nbytes / 2 / 1e9)
    latency = 3 * 1e-3
    assert halved["all_gather"] - latency == pytest.approx(
        (of_nodes_of(2)["all_gather"] - latency) / 2
    )


def test_one_rank_communicates_nothing() -> None:
    for transport in TRANSPORTS:
        setup = simple(1 << 20, 1, 8, transport=transport)
        alone = times(setup, MACHINE)
        assert alone["reduce"] == alone["all_gather"] == demand.sent(setup)["total"] == 0


@pytest.mark.parametrize(
    ("dtype", "how", "expected"),
    [
        ("float32", {}, 36),
        ("float64", {}, 72),
        ("float32", {"optimizer": "SGD"}, 12),
        ("float32", {"optimizer": "Adam"}, 28),
        ("float16", {}, 18),
        # float16: the gradient is read, the parameter written; masters and states are float32.
        ("float16", {"fp32_update": True}, 2 + 2 + 8 + 24),
    ],
)
def test_an_update_reads_and_writes_everything_once(
    dtype: str, how: dict[str, Any], expected: int
) -> None:
    setup = simple(1 << 20, 4, 8, dtype, **how)
    assert update_bytes(setup, setup.groups[0]) == expected
    assert times(setup, MACHINE)["update"] == pytest.approx(expected * 2**18 / 100e9)
    assert chainermn_times(setup, MACHINE)["update"] == pytest.approx(expected * 2**20 / 100e9)


def test_chainermn_reduces_in_a_ring_to_everybody() -> None:
    nbytes = 4 * 2**20
    parts = {"pack": 4 * nbytes / 100e9, "reduce": 2 * (3e-3 + 3 / 4 * nbytes / 1e9)}
    parts |= {"gather_gradients": 0, "update": 36 * 2**20 / 100e9, "all_gather": 0}
    expected = {**parts, "total": sum(parts.values())}
    assert chainermn_times(simple(1 << 20, 4, 2), MACHINE) == pytest.approx(expected)
