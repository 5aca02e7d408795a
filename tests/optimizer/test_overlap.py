"""Reduction during the backward pass: the same bits as after it, whatever happens."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

from smorms3_dist import NoMoreBatches, create_multi_node_optimizer
from smorms3_dist.optimizer import overlap

import chainer
import chainer.functions as F
import chainer.links as L
import mpirun
import numpy as np
import pytest
from backward_models import (
    MODELS,
    STEPS,
    Dynamic,
    Mixed,
    Mlp,
    Net,
    batch,
    orders_of,
    reductions,
    same_bits,
    train,
)
from chainer import optimizer_hooks
from models import assert_same_bits, on_ranks
from rank_threads import ThreadCollectives, ThreadSideChannel, run_ranks


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_models_of_all_kinds_come_out_the_same(model: type[Net], world: int) -> None:
    def body(optimizer: Any, rank: int) -> None:
        if model is Mixed:
            optimizer.use_fp32_update()
        train(optimizer, rank)

    _, optimizers = same_bits(world, body, model)
    # The first update learns the order; each later one reduces both dtypes.
    each = 2 if model is Mixed else 1
    assert [reductions(o) for o in optimizers] == [each * (STEPS - 1)] * world


@pytest.mark.parametrize(
    "hooks",
    [
        [optimizer_hooks.WeightDecay(0.1)],
        [optimizer_hooks.WeightDecay(0.1), optimizer_hooks.GradientClipping(0.01)],
        [optimizer_hooks.Lasso(0.1), optimizer_hooks.GradientHardClipping(-0.1, 0.1)],
        [optimizer_hooks.GradientLARS()],
    ],
    ids=lambda hooks: ",".join(type(hook).__name__ for hook in hooks),
)
def test_hooks_see_what_they_see_without(hooks: list[Any]) -> None:
    def body(optimizer: Any, rank: int) -> None:
        for hook in hooks:
            optimizer.add_hook(hook)
        train(optimizer, rank)

    _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == STEPS - 1


@pytest.mark.filterwarnings("ignore:the mean gradient of")
def test_loss_scales_and_gradients_that_are_kept() -> None:
    def body(optimizer: Any, rank: int) -> list[bytes]:
        optimizer.loss_scaling(interval=2, scale=2.0**110)
        optimizer.keep_gradients = True
        train(optimizer, rank, 1)
        optimizer.set_loss_scale(2.0**140)
        grads = []
        for step in range(1, STEPS):
            with np.errstate(all="ignore"):
                optimizer.update(optimizer.target.loss, rank, step)
            optimizer.gather_gradients()
            grads.append(optimizer.target.b.W.grad.tobytes())
        return [*grads, repr(optimizer._loss_scale).encode()]

    def run(wanted: bool) -> list[Any]:
        return on_ranks(2, body, make_model=Mlp, overlap=wanted)

    early, late = run(True), run(False)
    assert early == late
    assert early[0] == early[1]


def test_batches_of_two_optimizers_go_through_each_others_models() -> None:
    """A generator and its critic."""

    def run(wanted: bool) -> list[Any]:
        def body(optimizer: Any, rank: int) -> Any:
            generator = optimizer.target
            critic = Net(a=L.Linear(3, 11), b=L.Linear(11, 1)).fill()
            other = create_multi_node_optimizer(
                chainer.optimizers.SMORMS3(), optimizer.collectives, overlap=wanted
            ).setup(critic)

            def score(x: Any) -> Any:
                return critic.b(F.tanh(critic.a(x)))

            def fake(step: int) -> Any:
                h = F.tanh(generator.a(batch(rank, step, 7, 13)))
                return generator.c(F.tanh(generator.b(h)))

            for step in range(STEPS):
                other.update(lambda s=step: F.sum(score(fake(s)) - score(batch(rank, s, 7, 3))))
                optimizer.update(lambda s=step: -F.sum(score(fake(s))))
            if wanted:
                assert reductions(optimizer) == reductions(other) == STEPS - 1
            return generator, critic

        return on_ranks(2, body, make_model=Mlp, overlap=wanted)

    for early, late in zip(run(True), run(False), strict=True):
        for one, other in zip(early, late, strict=True):
            assert_same_bits(one, other)


def test_the_order_is_that_of_the_first_backward_pass_and_fixed() -> None:
    def body(optimizer: Any, rank: int) -> Any:
        train(optimizer, rank)
        return [
            [[[s.slot.name for s in piece.segments] for piece in of_rank] for of_rank in order]
            for order in orders_of(optimizer)
        ]

    orders, _ = same_bits(3, body, Dynamic)
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == STEPS - 1
    assert all(order == orders[0][0] for order in orders[0])

    class Long(Mlp):
        """Layers that are larger than a piece."""

        def __init__(self) -> None:
            Net.__init__(self, a=L.Linear(13, 700), b=L.Linear(700, 900), c=L.Linear(900, 3))
            self.fill()

    orders, _ = same_bits(2, body, Long)
    for of_rank in orders[0][0]:
        large = [names[0] for names in of_rank if len(names) == 1]
        assert large == sorted(large, reverse=True)


class Held(Mlp):
    """Its first layer's backward pass waits until something has come from the other rank."""

    optimizer: Any = None

    def loss(self, rank: int, step: int) -> Any:
        early = self.optimizer._overlap

        class Waiting(chainer.FunctionNode):
            def forward(self, inputs: Any) -> Any:
                return (inputs[0].copy(),)

            def backward(self, indexes: Any, grads: Any) -> Any:
                if early._begun is not None:
                    (part,) = early._begun._parts
                    with part._changed:
                        assert part._changed.wait_for(lambda: part.arrived, 60)
                return grads

        (h,) = Waiting().apply((self.a(batch(rank, step, 7, 13)),))
        return F.sum(F.square(self.c(F.tanh(self.b(F.tanh(h))))))


def test_the_last_layers_arrive_while_the_first_ones_backward_pass_is_still_to_come() -> None:
    class Long(Held):
        def __init__(self) -> None:
            Net.__init__(self, a=L.Linear(13, 1500), b=L.Linear(1500, 800), c=L.Linear(800, 3))
            self.fill()

    def body(optimizer: Any, rank: int) -> None:
        optimizer.target.optimizer = optimizer
        train(optimizer, rank, 3)

    _, optimizers = same_bits(2, body, Long)
    assert reductions(optimizers[0]) == 2


def test_the_update_waits_for_what_has_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str | None] = []
    inner = ThreadSideChannel.reduce_in_order

    def late(self: ThreadSideChannel, *args: Any) -> Any:
        # Only once the rank has nothing else to do.
        assert self.hurried.wait(60)
        waits.append(self._host.wait.at)
        return inner(self, *args)

    monkeypatch.setattr(ThreadSideChannel, "reduce_in_order", late)
    same_bits(2, train)
    assert len(waits) == 2 * (STEPS - 1)


# What ranks must have alike, and how it ends


def test_ranks_must_be_told_alike() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank)

    def run(collectives: Any) -> None:
        actual = chainer.optimizers.SMORMS3()
        optimizer = create_multi_node_optimizer(
            actual, collectives, overlap=("auto", True)[collectives.rank]
        ).setup(Mlp())
        body(optimizer, collectives.rank)

    with pytest.raises(RuntimeError, match="overlap: auto on rank 0, True on rank 1"):
        run_ranks(2, run)
    told = r"rank 0 is in lay_out\(\) \(overlap=auto\), rank 1 is in lay_out\(\) \(overlap=True\)"
    with pytest.raises(RuntimeError, match=told):
        run_ranks(
            2,
            lambda c: (
                create_multi_node_optimizer(
                    chainer.optimizers.SMORMS3(), c, overlap=("auto", True)[c.rank]
                )
                .setup(Mlp())
                .lay_out()
            ),
        )


@pytest.mark.parametrize("both", [True, False])
def test_ranks_that_differ_in_a_fact_go_on_when_they_do_not_any_more(both: bool) -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        optimizer.lr *= 1 + rank
        with pytest.raises(RuntimeError, match="lr of the optimizer"):
            if both or rank:
                optimizer.update(optimizer.target.loss, rank, 0)
            else:
                optimizer.update()
        optimizer.lr /= 1 + rank
        train(optimizer, rank, 3)

    _, optimizers = same_bits(2, body)
    # Two, one in vain, and two after the order has been learned again.
    assert reductions(optimizers[0]) == 2 + 1 + 2


def test_ranks_of_which_one_gives_up_go_on_without_it() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        if rank == 1:
            optimizer._overlap = overlap.Overlap(True)
        with pytest.raises(RuntimeError, match=r"overlap of reduction and backward pass: in the"):
            train(optimizer, rank, 1)
        # Both are decided and have nothing then.
        optimizer._overlap = overlap.Overlap(False)
        optimizer._overlap.wanted = True
        train(optimizer, rank, 2)

    on_ranks(2, body, make_model=Mlp, overlap=True)


def test_training_ends_well_where_the_first_rank_has_no_more_batches() -> None:
    def body(optimizer: Any, rank: int) -> int:
        try:
            train(optimizer, rank, 3 + rank)
            optimizer.no_more_batches()
        except NoMoreBatches:
            assert rank == 1
        # Another one may follow.
        train(optimizer, rank, 2)
        return int(optimizer.t)

    assert on_ranks(2, body, make_model=Mlp, overlap=True, uneven="stop") == [4, 4]


def test_copies_begin_afresh() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        shallow = copy.copy(optimizer)
        train(shallow, rank, 3)
        deep = copy.deepcopy(shallow)
        train(deep, rank, 3)
        assert threading.active_count() < 50
        optimizer.setup(deep.target)

    same_bits(2, body)


# Where it is done


@pytest.mark.parametrize(
    ("hosts", "cores", "expected"),
    [
        ("ab", [{0, 1}, {0, 1}], True),
        ("aa", [{0, 1, 2, 3}, {0, 1, 2, 3}], False),
        ("ab", [{0}, {0, 1}], False),
        ("aabb", [{0, 1}] * 4, False),
        ("aabb", [{0, 1, 2}] * 4, True),
    ],
)
def test_auto_wants_several_hosts_and_cores_to_spare(
    monkeypatch: pytest.MonkeyPatch, hosts: str, cores: list[set[int]], expected: bool
) -> None:
    here = threading.local()
    monkeypatch.setattr(overlap, "running_host", lambda: hosts[here.rank])
    monkeypatch.setattr(overlap, "_cores", lambda: frozenset(cores[here.rank]))

    def body(optimizer: Any, rank: int) -> str:
        here.rank = rank
        train(optimizer, rank, 3)
        return str(optimizer._overlap.state)

    states = on_ranks(len(hosts), body, make_model=Mlp, overlap="auto")
    assert {state != "none" for state in states} == {expected}


def test_without_threads_true_says_why_not_and_auto_is_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ThreadCollectives, "obstacle", "it has no threads")
    with caplog.at_level(logging.INFO):
        for wanted in (True, "auto"):
            on_ranks(2, lambda o, r: train(o, r, 2), make_model=Mlp, overlap=wanted)
    told = [r.getMessage() for r in caplog.records if "overlap" in r.getMessage()]
    assert told == [
        "gradients are reduced after the backward pass (overlap): on rank 0 it has no threads"
    ]


@pytest.mark.mpi
def test_ranks_of_mpi() -> None:
    for values in mpirun.run_worlds(2, "overlap.py")[2]:
        assert values["same_bits"]
        assert values["same_bits_beside_the_forward_pass"]
        assert values["same_bits_in_a_narrow_dtype"]
        assert values["alike"]
        states = [state for state in values["states"] if state != "caught"]
        assert ("caught" in values["states"]) == (values["rank"] == 1)
        ordered, learning = "in the order", "in an order "
        # What a failed update has handed over makes the next one begin again.
        assert states[:8] == [ordered] * 4 + [learning] + [ordered] * 3
        assert states[8:] == ["refused", ordered, ordered]
        # That one was made twice, and the one of the update that was refused in vain.
        assert values["sent"] == 9 + 2
