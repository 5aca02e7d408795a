"""`smorms3_dist.shard`: taking over an optimizer that ChainerMN has made, and what it refuses."""

from __future__ import annotations

from typing import Any

import smorms3_dist

import chainer
import chainer.links as L
import chainermn.optimizers
import models
import mpirun
import pytest
from rank_threads import ThreadCollectives, run_ranks

CASES = ["SMORMS3", "Adam", "float16 with masters", "hooks", "a user's hook"]
MOMENTS = [
    "before setup",
    "after setup",
    "after the broadcast",
    "in the middle",
    "in the middle, replicated",
]
UPDATES = 12


def trained(world_size: int) -> list[dict[str, Any]]:
    return mpirun.run_worlds(3, "shard.py")[world_size]


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_goes_on_bit_for_bit_as_by_chainermn(world_size: int, case: str) -> None:
    for values in trained(world_size):
        for moment in MOMENTS:
            result = values[case][moment]
            assert result["same_bits"], (moment, result["relative"])
            assert result["same_states"], moment


@pytest.mark.mpi
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("float16")])
def test_a_training_on_three_ranks_goes_on_to_1e_6_as_by_chainermn(case: str) -> None:
    for values in trained(3):
        assert all(values[case][moment]["relative"] <= 1e-6 for moment in MOMENTS)


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_update_is_lost_and_counts_and_hyperparameters_stay_chainermns(world_size: int) -> None:
    for values in trained(world_size):
        for case in CASES:
            for moment in MOMENTS:
                assert values[case][moment]["t"] == UPDATES - 1
                assert values[case][moment]["same_settings"], (case, moment)


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_the_old_optimizer_had_is_kept_at_every_moment(world_size: int) -> None:
    kept = {"settings": True, "hooks": True, "states": True, "optimizer": True}
    kept |= {"communicator": True}
    for values in trained(world_size):
        for case in CASES:
            assert values[case]["after setup"]["kept"] == kept
            for moment in MOMENTS[2:]:
                assert values[case][moment]["kept"] == {**kept, "a step each update": True}


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_whole_states_are_freed_and_all_shards_together_are_as_large(
    world_size: int, case: str
) -> None:
    bytes_of_a_parameter = {"Adam": 8, "float16 with masters": 16}.get(case, 12)
    reports = trained(world_size)
    for moment in MOMENTS:
        results = [values[case][moment] for values in reports]
        assert all(result["freed"] for result in results)
        held = [result["state_bytes"] for result in results]
        assert sum(held) == bytes_of_a_parameter * results[0]["parameters"]
        # No rank has everything: at most its part, rounded up to the alignment of shards.
        assert max(held) <= sum(held) / world_size + bytes_of_a_parameter * 128


@pytest.mark.mpi
def test_gradients_are_sharded_unless_asked_or_a_hook_needs_them() -> None:
    for values in trained(2):
        for case in CASES:
            expected = "replicated" if case == "a user's hook" else "sharded"
            assert {values[case][moment]["mode"] for moment in MOMENTS[:-1]} == {expected}
            assert values[case]["in the middle, replicated"]["mode"] == "replicated"


def chainermns(collectives: Any, **options: Any) -> Any:
    """ChainerMN's optimizer, around SMORMS3. It makes no use of the communicator before updates."""
    return chainermn.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(lr=0.02), collectives, **options
    )


def step(optimizer: Any, rank: int) -> None:
    models.set_gradients(optimizer.target, rank, optimizer.t)
    optimizer.update()


def test_what_the_user_gave_to_chainermn_is_kept() -> None:
    def run(collectives: ThreadCollectives) -> None:
        old = chainermns(collectives, zero_fill=False)
        optimizer = smorms3_dist.shard(old, gradients="replicated")
        assert isinstance(optimizer, smorms3_dist.ShardedOptimizer)
        assert optimizer.actual_optimizer is old.actual_optimizer
        assert optimizer.communicator is collectives
        assert (optimizer.lr, optimizer.zero_fill) == (0.02, False)
        assert (optimizer.gradients, optimizer.step_after_broadcast) == ("replicated", False)

    run_ranks(1, run)


def test_the_first_update_steps_only_if_the_parameters_there_are_were_broadcast() -> None:
    def run(collectives: ThreadCollectives) -> list[int]:
        counts = []
        for broadcast, extended in [(False, False), (True, False), (True, True)]:
            old = chainermns(collectives)
            model = chainer.Chain(inner=models.Model())
            old.setup(model)
            if broadcast:
                # By this ChainerMN notes what it is about to broadcast.
                assert old.is_changed(model)
            if extended:
                model.add_link("later", L.Linear(3, 2))
            optimizer = smorms3_dist.shard(old)
            step(optimizer, collectives.rank)
            counts.append(optimizer.t)
            step(optimizer, collectives.rank)
            assert optimizer.t == counts[-1] + 1
        return counts

    assert run_ranks(2, run) == [[0, 1, 0]] * 2


def test_a_chainer_optimizer_is_refused() -> None:
    with pytest.raises(
        TypeError,
        match="SMORMS3 is not a multi-node optimizer of ChainerMN's; pass what "
        r"chainermn\.create_multi_node_optimizer returned, or use "
        r"smorms3_dist\.create_multi_node_optimizer",
    ):
        smorms3_dist.shard(chainer.optimizers.SMORMS3())


@pytest.mark.parametrize("nonsense", [object(), None, models.Model])
def test_what_is_no_optimizer_is_refused(nonsense: Any) -> None:
    with pytest.raises(TypeError, match="is not a multi-node optimizer of ChainerMN's"):
        smorms3_dist.shard(nonsense)


def test_an_optimizer_that_is_sharded_already_is_refused() -> None:
    def run(collectives: ThreadCollectives) -> None:
        for sharded in (
            smorms3_dist.shard(chainermns(collectives)),
            smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives),
        ):
            with pytest.raises(TypeError, match="is sharded already; use it as it is"):
                smorms3_dist.shard(sharded)

    run_ranks(1, run)


def test_an_unknown_gradients_argument_is_refused() -> None:
    def run(collectives: ThreadCollectives) -> None:
        old = chainermns(collectives)
        with pytest.raises(
            ValueError, match="gradients must be one of auto, replicated, sharded, not 'some'"
        ):
            smorms3_dist.shard(old, gradients="some")
        # Nothing has happened to it.
        assert smorms3_dist.shard(old).gradients == "auto"

    run_ranks(1, run)


def test_a_double_buffering_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(collectives: ThreadCollectives) -> None:
        # What chainermn.create_multi_node_optimizer returns for a communicator of GPUs.
        old = chainermn.optimizers._DoubleBufferingOptimizer(
            chainer.optimizers.SMORMS3(), collectives, True
        )
        for moment in ("before setup", "after setup"):
            with pytest.raises(
                TypeError,
                match="_DoubleBufferingOptimizer cannot be taken over: it applies gradients one "
                r"step late, .* without double_buffering=True",
            ):
                smorms3_dist.shard(old)
            if moment == "before setup":
                old.setup(models.Model())

    # It makes a stream of the GPU, and uses it at updates only.
    monkeypatch.setattr(chainer.cuda, "Stream", lambda non_blocking: None)
    run_ranks(1, run)
