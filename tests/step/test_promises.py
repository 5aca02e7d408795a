"""The promises of the design, seen on MPI ranks against ChainerMN's own optimizer."""

from __future__ import annotations

from typing import Any

import mpirun
import pytest

pytestmark = pytest.mark.mpi

MODES = ["sharded", "replicated"]
HOOKS = ["none", "all", "WeightDecay", "Lasso", "GradientHardClipping"]
HOOKS += ["GradientClipping", "GradientLARS"]
WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])

# Norms of gradients: weights are everywhere.
NORMS = {"GradientClipping": 1, "GradientLARS": 1, "all": 2}


def trained(world_size: int) -> list[dict[str, Any]]:
    """What each rank reports, by hooks and mode."""
    reports = [values["steps"] for values in mpirun.run_worlds(5, "promises.py")[world_size]]
    expected = {f"{hooks}, {mode}" for hooks in hooks_at(world_size) for mode in MODES}
    assert all(values.keys() == expected for values in reports)
    return reports


def hooks_at(world_size: int) -> list[str]:
    return HOOKS if world_size <= 3 else HOOKS[:2]


@WORLD_SIZES
def test_promise_1_parameters_equal_chainermn_bit_for_bit_or_to_1e_6(world_size: int) -> None:
    for values in trained(world_size):
        for what in (f"{hooks}, {mode}" for hooks in hooks_at(world_size) for mode in MODES):
            assert values[what]["relative"] <= 1e-6, what
            assert values[what]["same_bits"] or world_size > 2, what


@WORLD_SIZES
def test_promise_1_holds_for_gradients_that_are_applied_one_update_late(world_size: int) -> None:
    for values in mpirun.run_worlds(5, "promises.py")[world_size]:
        late = values["late"]
        assert late.keys() == {f"{hooks}, {mode}" for hooks in ("none", "all") for mode in MODES}
        for what, result in late.items():
            assert result["relative"] <= 1e-6, what
            assert result["same_bits"] or world_size > 2, what
            assert result["beside"] == (world_size > 1), what


@WORLD_SIZES
def test_promise_2_states_take_12_bytes_a_parameter_over_all_ranks(world_size: int) -> None:
    reports = trained(world_size)
    for what in (f"{hooks}, {mode}" for hooks in hooks_at(world_size) for mode in MODES):
        results = [values[what] for values in reports]
        assert sum(result["state_bytes"] for result in results) == 12 * results[0]["parameters"]
        # Equal parts of the buffer, of which a rank's share differs by the gaps between parameters.
        part = results[0]["flat_bytes"] // world_size
        assert all(result["state_bytes"] <= 3 * part for result in results)


@WORLD_SIZES
def test_promise_3_a_sharded_step_sends_each_gradient_and_each_parameter_once(
    world_size: int,
) -> None:
    for rank, values in enumerate(trained(world_size)):
        for hooks in hooks_at(world_size):
            sharded, replicated = values[f"{hooks}, sharded"], values[f"{hooks}, replicated"]
            steps = sharded["steps"]
            assert steps == replicated["steps"] == 7
            others = sum(sharded["shards"]) - sharded["shards"][rank]
            part = sharded["flat_bytes"] // world_size
            peers = world_size - 1
            assert sharded["sent"].get("reduce_scatter", 0) == steps * 4 * others
            assert sharded["sent"].get("all_gather", 0) == steps * part * peers
            # Whole gradients cost one more gathering.
            assert replicated["sent"].get("reduce_scatter", 0) == steps * 4 * others
            assert replicated["sent"].get("all_gather", 0) == 2 * steps * part * peers


@WORLD_SIZES
def test_promise_3_norms_cost_nothing_more_but_on_two_ranks_a_few_sums_of_one_parameter(
    world_size: int,
) -> None:
    reports = trained(world_size)
    for hooks in hooks_at(world_size):
        results = [values[f"{hooks}, sharded"] for values in reports]
        assert (results[0]["shared_out"] > 0) == (world_size == 2)
        # The first call sends the parameters of rank 0.
        first = results[0]["flat_bytes"] * (world_size - 1)
        norms = results[0]["steps"] * NORMS.get(hooks, 0) * results[0]["shared_out"]
        assert sum(result["sent"].get("broadcast", 0) for result in results) == first + norms
