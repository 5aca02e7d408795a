"""Gradients that are handed over during the backward pass, and not used."""

from __future__ import annotations

import logging
import threading
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.collectives.base import AbandonedError
from smorms3_dist.step.agreement import NO_FLAGS, Flag

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from backward_models import (
    STEPS,
    Dynamic,
    Mixed,
    Mlp,
    Net,
    batch,
    reductions,
    same_bits,
    train,
)
from models import arrays, on_ranks
from rank_threads import run_ranks


def manual(optimizer: Any, rank: int, step: int) -> None:
    """A step of a loop that computes gradients itself, and changes them."""
    model = optimizer.target
    loss = model.loss(rank, step)
    model.cleargrads()
    loss.backward()
    model.b.W.grad *= 0.5
    model.a.b.grad = None
    optimizer.update()


def test_gradients_of_the_users_own_are_reduced_as_the_user_leaves_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def body(optimizer: Any, rank: int) -> None:
        for step in range(STEPS):
            manual(optimizer, rank, step)

    with caplog.at_level(logging.INFO):
        _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == 0
    (told,) = (r for r in caplog.records if "(overlap)" in r.getMessage())
    assert told.levelno == logging.WARNING
    assert "update(lossfun, ...) has not computed them" in told.getMessage()


@pytest.mark.parametrize("which", ["all", "one"])
def test_such_steps_may_alternate_with_others(which: str) -> None:
    def body(optimizer: Any, rank: int) -> None:
        for step in range(3 * STEPS):
            if step % 4 == 3 and (which == "all" or rank == 1):
                manual(optimizer, rank, step)
            else:
                optimizer.update(optimizer.target.loss, rank, step)

    same_bits(2, body)


def test_micro_batches_are_added_up_first() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 4)
        with optimizer.accumulate():
            train(optimizer, rank, 2)
        train(optimizer, rank, 3)

    _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == 3 + 3


@pytest.mark.parametrize("model", [Dynamic, Mixed])
def test_the_last_micro_batch_hands_over_the_means_of_all(model: type[Net]) -> None:
    def body(optimizer: Any, rank: int) -> None:
        # float16 is added up in float32; parameters that only some micro-batches use.
        train(optimizer, rank, 9)

    _, optimizers = same_bits(2, body, model, accumulate=3)
    assert reductions(optimizers[0]) == 2 * (2 if model is Mixed else 1)


@pytest.mark.parametrize("sent", ["bfloat16", "float16"])
def test_gradients_and_parameters_in_a_narrow_dtype(sent: str) -> None:
    options = {"communication_dtype": sent, "gather_dtype": sent}
    _, optimizers = same_bits(3, train, **options)
    assert reductions(optimizers[0]) == STEPS - 1
    wide = same_bits(3, train)[1][0]
    assert optimizers[0].collectives.bytes_sent["reduce_scatter"] == (
        wide.collectives.bytes_sent["reduce_scatter"] / 2
    )


def test_rules_on_whole_arrays_and_parameters_without_an_update() -> None:
    class Whole(chainer.optimizers.sgd.SGDRule):
        is_elementwise = False

        def update_core_cpu(self, param: Any) -> None:
            param.array -= self.hyperparam.lr * np.sign(param.grad) * np.abs(param.grad).max()

    def body(optimizer: Any, rank: int) -> None:
        optimizer.target.a.W.update_rule = Whole(lr=0.01)
        optimizer.target.c.disable_update()
        train(optimizer, rank)

    _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == STEPS - 1


def test_ranks_in_different_optimizers_are_told_of_it() -> None:
    def body(optimizer: Any, rank: int) -> None:
        actual = chainer.optimizers.SMORMS3()
        other = create_multi_node_optimizer(actual, optimizer.collectives, overlap=True)
        both = [optimizer, other.setup(Mlp())]
        for _ in range(3):
            for each in both:
                train(each, rank, 1)
        with pytest.raises(RuntimeError, match=r"optimizer: number 1 .* on rank 0, number 2"):
            train(both[rank], rank, 1)
        assert both[rank]._overlap.state == "none"

    on_ranks(2, body, make_model=Mlp, overlap=True)


def test_a_reduction_that_fails_is_told_with_the_rank_and_the_cause() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 2)
        if rank == 1:
            optimizer._overlap._channel.fault = OSError("a cable is broken")
        cause = ("BrokenBarrierError", "OSError: a cable is broken")[rank]
        with pytest.raises(RuntimeError, match=rf"rank {rank}: the reduction.*{cause}"):
            train(optimizer, rank, 1)

    on_ranks(2, body, make_model=Mlp, overlap=True)


def test_with_double_buffering_it_is_refused() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        on_ranks(2, train, make_model=Mlp, overlap="auto", double_buffering=True)


def test_a_script_that_ends_does_not_wait_for_gradients_that_never_come() -> None:
    gave_up = threading.Event()

    def work(ranks: Any) -> None:
        assert ranks.hurried.wait(60)
        try:
            ranks.progress()
        except AbandonedError:
            gave_up.set()
            raise
        yield

    def run(collectives: Any) -> None:
        channel = collectives.open_early_channel()
        channel.start_early(work)
        # As at the end of Python.
        channel.end()
        assert not channel._thread.is_alive()

    run_ranks(1, run)
    assert gave_up.is_set()


class Failing(Mlp):
    """Its backward pass fails half-way, where it is told to."""

    fails = False

    def loss(self, rank: int, step: int) -> Any:
        model = self

        class Here(chainer.FunctionNode):
            def forward(self, inputs: Any) -> Any:
                return (inputs[0].copy(),)

            def backward(self, indexes: Any, grads: Any) -> Any:
                if model.fails:
                    raise FloatingPointError("half-way")
                return grads

        (h,) = Here().apply((self.a(batch(rank, step, 7, 13)),))
        return F.sum(F.square(self.c(F.tanh(self.b(F.tanh(h))))))


@pytest.mark.parametrize("again", ["the same batch", "another batch", "gradients of its own"])
def test_a_rank_may_catch_what_fails_in_its_backward_pass(again: str) -> None:
    def body(optimizer: Any, rank: int) -> None:
        for step in range(2 * STEPS):
            if rank == 1 and step in (3, 4, 8):
                optimizer.target.fails = True
                with pytest.raises(FloatingPointError):
                    optimizer.update(optimizer.target.loss, rank, step)
                optimizer.target.fails = False
                if again == "gradients of its own":
                    manual(optimizer, rank, step)
                    continue
            now = step + 100 * (again == "another batch" and rank == 1)
            optimizer.update(optimizer.target.loss, rank, now)

    _, optimizers = same_bits(2, body, Failing)
    assert reductions(optimizers[0]) > STEPS


def test_a_rank_may_catch_what_fails_between_its_backward_pass_and_the_agreement() -> None:
    class Once:
        fails = False

        def flags(self) -> Flag:
            if self.fails:
                self.fails = False
                raise OSError("once")
            return NO_FLAGS

        def proceed(self, flags: Flag) -> None:
            """Nothing goes on."""

    def body(optimizer: Any, rank: int) -> None:
        work = Once()
        optimizer.ask_before_each_step(work)
        for step in range(STEPS):
            if rank == 1 and step in (2, 3):
                work.fails = True
                with pytest.raises(OSError, match="once"):
                    optimizer.update(optimizer.target.loss, rank, step + 50)
                if step == 3:
                    # Without a backward pass.
                    for param in optimizer.target.params():
                        param.grad = np.full_like(param.array, 0.25)
                    optimizer.update()
                    continue
            optimizer.update(optimizer.target.loss, rank, step)

    same_bits(2, body)


class Forgetful(Mlp):
    """Within the pass there is another one, of which nobody knows before."""

    def loss(self, rank: int, step: int) -> Any:
        x = batch(rank, step, 7, 13)
        h = F.forget(lambda x: F.tanh(self.a(x)), chainer.Variable(x))
        return F.sum(F.square(self.c(F.tanh(self.b(h))))) + F.sum(self.a.W)


class Changing(Mlp):
    """A loss whose own backward pass halves a gradient at its end, in some steps of a rank."""

    def loss(self, rank: int, step: int) -> Any:
        loss = super().loss(rank, step)
        backward = loss.backward

        def halving(**kwds: Any) -> None:
            backward(**kwds)
            if rank == 1 and step % 3 == 2:
                self.b.W.grad = self.b.W.grad * 0.5

        loss.backward = halving
        return loss


@pytest.mark.parametrize("model", [Forgetful, Changing])
def test_gradients_that_change_within_the_pass_are_handed_over_again(model: type[Net]) -> None:
    same_bits(2, train, model)


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_model_or_its_hooks_may_change_between_steps(ranks: tuple[int, ...]) -> None:
    class Looking:
        """Needs whole gradients."""

        name = "Looking"
        timing = "pre"

        def __call__(self, optimizer: Any) -> None:
            assert all(p.grad is not None for p in optimizer.target.params())

    class Growing(Mlp):
        extra: Any = None

        def loss(self, rank: int, step: int) -> Any:
            loss = super().loss(rank, step)
            return loss if step < 4 else loss + F.sum(self.more.W * self.a.b)

    def body(optimizer: Any, rank: int) -> None:
        model = optimizer.target
        for step in range(2 * STEPS):
            if step == 4:
                with model.init_scope():
                    model.more = L.Linear(37, 1, initialW=np.ones((1, 37), np.float32))
            if step == 7 and rank in ranks:
                optimizer.add_hook(Looking())
            if step == 9 and rank in ranks:
                optimizer.remove_hook("Looking")
            optimizer.update(model.loss, rank, step)

    _, optimizers = same_bits(2, body, Growing)
    # 1 to 3; not in the step of the new parameter, nor in the next, which learns the order; in vain
    # with the hook, of which no other rank may know, and not in the next; learned again without it.
    assert reductions(optimizers[0]) == 3 + 1 + 1 + 2


def test_a_model_that_only_one_rank_replaces_arrays_of() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 3)
        if rank == 1:
            for param in optimizer.target.params():
                param.array = param.array.copy()
        train(optimizer, rank, 3)

    _, optimizers = same_bits(2, body)
    assert reductions(optimizers[0]) == 5


def test_gradients_that_are_not_finite_are_named_before_anything_is_updated() -> None:
    def body(optimizer: Any, rank: int) -> None:
        model = optimizer.target
        train(optimizer, rank, 3)
        before = {name: array.copy() for name, array in arrays(model).items()}
        with np.errstate(all="ignore"), pytest.raises(RuntimeError, match=r"/c/b.*rank 1"):
            optimizer.update(lambda: F.sum(model.c.b * np.float32([1, np.inf][rank])))
        assert all(np.array_equal(array, before[n]) for n, array in arrays(model).items())
        train(optimizer, rank, 3)

    same_bits(2, body, check_finite="error")
