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
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_training_goes_on_as_by_chainermn_and_nothing_that_was_there_is_lost(
    world_size: int, case: str
) -> None:
    kept = dict.fromkeys(("settings", "hooks", "states", "optimizer", "communicator"), True)
    bytes_of_a_parameter = {"Adam": 8, "float16 with masters": 16}.get(case, 12)
    reports = trained(world_size)
    for moment in MOMENTS:
        results = [values[case][moment] for values in reports]
        whole = case == "a user's hook" or moment.endswith("replicated")
        for result in results:
            if world_size <= 2:
                assert result["same_bits"], (moment, result["relative"])
                assert result["same_states"], moment
            elif not case.startswith("float16"):
                assert result["relative"] <= 1e-6
            assert result["t"] == UPDATES - 1
            assert result["same_settings"], moment
            assert result["mode"] == ("replicated" if whole else "sharded")
            if moment == "after setup":
                assert result["kept"] == kept
            elif moment != "before setup":
                assert result["kept"] == {**kept, "a step each update": True}
            # Whole states are freed, and all shards together are as large.
            assert result["freed"]
        held = [result["state_bytes"] for result in results]
        assert sum(held) == bytes_of_a_parameter * results[0]["parameters"]
        # No rank has everything: at most its part, rounded up to the alignment of shards.
        assert max(held) <= sum(held) / world_size + bytes_of_a_parameter * 128


def chainermns(collectives: Any, **options: Any) -> Any:
    """ChainerMN's optimizer, around SMORMS3. It makes no use of the communicator before updates."""
    return chainermn.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(lr=0.02), collectives, **options
    )


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
            models.train(optimizer, collectives.rank, [1])
            counts.append(optimizer.t)
            models.train(optimizer, collectives.rank, [1])
            assert optimizer.t == counts[-1] + 1
        return counts

    assert run_ranks(2, run) == [[0, 1, 0]] * 2


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (
            *(lambda c: chainer.optimizers.SMORMS3(), {}, TypeError),
            "SMORMS3 is not a multi-node optimizer of ChainerMN's; pass what "
            r"chainermn\.create_multi_node_optimizer returned, or use "
            r"smorms3_dist\.create_multi_node_optimizer",
        ),
        (lambda c: None, {}, TypeError, "is not a multi-node optimizer of ChainerMN's"),
        (lambda c: models.Model, {}, TypeError, "is not a multi-node optimizer of ChainerMN's"),
        (
            *(lambda c: smorms3_dist.shard(chainermns(c)), {}, TypeError),
            "is sharded already; use it as it is",
        ),
        (
            *(chainermns, {"gradients": "some"}, ValueError),
            "gradients must be one of auto, replicated, sharded, not 'some'",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_refused(
    given: Any, options: dict[str, str], error: type[Exception], message: str
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        with pytest.raises(error, match=message):
            smorms3_dist.shard(given(collectives), **options)

    run_ranks(1, run)
