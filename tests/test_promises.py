"""The promises of the design, seen on MPI ranks against ChainerMN's own optimizer."""

from __future__ import annotations

import functools
from typing import Any

import mpirun
import pytest

pytestmark = pytest.mark.mpi

MODES = ["sharded", "replicated"]


@functools.cache
def trained(world_size: int) -> list[dict[str, Any]]:
    return mpirun.run_program(world_size, "promises.py")


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_promise_1_parameters_equal_chainermn_bit_for_bit(world_size: int, gradients: str) -> None:
    for values in trained(world_size):
        assert values[gradients]["same_bits"], values[gradients]["relative"]


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [3, 4, 5])
def test_promise_1_parameters_equal_chainermn_to_1e_6(world_size: int, gradients: str) -> None:
    for values in trained(world_size):
        assert values[gradients]["relative"] <= 1e-6


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_promise_2_states_take_12_bytes_a_parameter_over_all_ranks(world_size: int) -> None:
    reports = trained(world_size)
    parameters = reports[0]["sharded"]["parameters"]
    state_bytes = [values["sharded"]["state_bytes"] for values in reports]
    assert sum(state_bytes) == 12 * parameters
    # Equal parts of the buffer, of which a rank's share differs by the gaps between parameters.
    part = reports[0]["sharded"]["flat_bytes"] // world_size
    assert all(held <= 3 * part for held in state_bytes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_promise_3_a_sharded_step_sends_each_gradient_and_each_parameter_once(
    world_size: int,
) -> None:
    steps = 29
    for rank, values in enumerate(trained(world_size)):
        sharded, replicated = values["sharded"], values["replicated"]
        others = sum(sharded["shards"]) - sharded["shards"][rank]
        part = sharded["flat_bytes"] // world_size
        peers = world_size - 1
        assert sharded["sent"].get("reduce_scatter", 0) == steps * 4 * others
        assert sharded["sent"].get("all_gather", 0) == steps * part * peers
        # Whole gradients cost one more gathering.
        assert replicated["sent"].get("reduce_scatter", 0) == steps * 4 * others
        assert replicated["sent"].get("all_gather", 0) == 2 * steps * part * peers
