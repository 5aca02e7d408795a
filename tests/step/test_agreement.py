"""What ranks tell each other before a step: flags come through, differences are named."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.step.agreement import NO_FLAGS, Flag, agree, meet
from smorms3_dist.step.facts import SharedFacts
from smorms3_dist.waiting import Wait

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks
from hypothesis import given
from hypothesis import strategies as st
from rank_threads import ThreadCollectives, run_ranks

OTHER_OCCASIONS = Flag.BETWEEN_STEPS | Flag.NO_MORE_BATCHES
flags = st.lists(st.sampled_from([flag for flag in Flag if flag not in OTHER_OCCASIONS])).map(
    lambda several: functools.reduce(operator.or_, several, NO_FLAGS)
)
digests = st.integers(0, 0xFFFFFF)


class Rank(ThreadCollectives):
    """A rank that hears the words of those that have spoken before it."""

    def __init__(self, words: list[int]) -> None:
        self.words = words
        self.wait = Wait(0)

    def exchange_word(self, word: int) -> int:
        # It is sent as a signed integer of 64 bits.
        assert 0 <= word < 1 << 63
        self.words.append(word)
        return functools.reduce(operator.or_, self.words)

    def exchange_note(self, note: Any) -> list[Any]:
        raise Compared(note)


class Compared(Exception):
    """The ranks have seen that they differ, and are about to find out how."""


def told(digest: int) -> Any:
    """Facts of which nothing but the digest counts."""
    return SimpleNamespace(digest=digest)


NOTHING = SharedFacts({}, {}, {})


@given(st.lists(flags, min_size=1, max_size=5), digests)
def test_flags_of_all_ranks_come_through_whatever_the_digest(
    of_ranks: list[Flag], digest: int
) -> None:
    words: list[int] = []
    for own in of_ranks:
        found = agree(own, told(digest), (), Rank(words))
    assert found == (functools.reduce(operator.or_, of_ranks) | Flag.IN_STEP, 0, ())


@given(flags, flags, digests, st.integers(1, 0x7FFFFF))
def test_any_two_digests_that_differ_are_noticed(
    first: Flag, second: Flag, mine: int, difference: int
) -> None:
    for differs in (difference, *(1 << bit for bit in range(23))):
        words: list[int] = []
        agree(first, told(mine), (), Rank(words))
        with pytest.raises(Compared):
            agree(second, told(mine ^ differs), (), Rank(words))


def test_a_fact_differs_from_none_and_so_does_what_was_saved() -> None:
    for facts, snapshots in ((SharedFacts({}, {"a": "1"}, {}), ()), (NOTHING, ("has saved",))):
        words: list[int] = []
        agree(NO_FLAGS, NOTHING, (), Rank(words))
        with pytest.raises(Compared):
            agree(NO_FLAGS, facts, snapshots, Rank(words))


def test_all_ranks_may_meet_between_steps_but_not_in_one() -> None:
    def all_meet(collectives: ThreadCollectives) -> Flag:
        return meet(collectives, "a save", Flag.LAY_OUT if collectives.rank else NO_FLAGS)

    assert run_ranks(2, all_meet) == [Flag.LAY_OUT | Flag.BETWEEN_STEPS] * 2

    def one_steps(collectives: ThreadCollectives) -> None:
        if collectives.rank:
            meet(collectives, "a save")
        else:
            agree(NO_FLAGS, NOTHING, (), collectives)

    with pytest.raises(RuntimeError, match="the ranks do different things"):
        run_ranks(2, one_steps)


def train(world_size: int, configure: Callable[[Any, int], None]) -> None:
    """Makes two updates on ranks that were told something each."""

    def run(collectives: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, step_after_broadcast=True
        ).setup(models.Model())
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
        configure(optimizer, collectives.rank)
        for step in range(2):
            models.set_gradients(optimizer.target, collectives.rank, step)
            optimizer.update()

    run_ranks(world_size, run)


def on_rank_1(configure: Callable[[Any], Any]) -> Callable[[Any, int], None]:
    return lambda optimizer, rank: configure(optimizer) if rank == 1 else None


DIFFERENCES = {
    "lr": (
        lambda o: setattr(o, "lr", 0.5),
        "lr of the optimizer: 0.001 on ranks 0 and 2, 0.5 on",
    ),
    "eps": (lambda o: setattr(o, "eps", 1e-8), "eps of the optimizer: .* on rank 1"),
    "lr of a rule": (
        lambda o: setattr(o.target.g.update_rule.hyperparam, "lr", 0.5),
        "update rule of /g: the optimizer's on ranks 0 and 2, SMORMS3Rule: lr=0.5 on",
    ),
    "enabled": (
        lambda o: setattr(o.target.a.update_rule, "enabled", False),
        "update rule of /a: enabled on ranks 0 and 2, disabled on rank 1",
    ),
    "hook": (
        lambda o: o.add_hook(optimizer_hooks.GradientClipping(1.0)),
        r"pre hooks of the optimizer: .* and .*'GradientClipping' \(GradientClipping with "
        r"threshold=1.0\) on rank 1",
    ),
    "rate of a hook": (
        lambda o: (o.remove_hook("WeightDecay"), o.add_hook(optimizer_hooks.WeightDecay(0.2))),
        r"with rate=0.1\) on ranks 0 and 2, 'WeightDecay' \(WeightDecay with rate=0.2\) on rank 1",
    ),
    "order of hooks": (
        lambda o: (
            o.remove_hook("WeightDecay"),
            o.add_hook(optimizer_hooks.Lasso(0.1)),
            o.add_hook(optimizer_hooks.WeightDecay(0.1)),
        ),
        r"'Lasso' \(Lasso with rate=0.1\), 'WeightDecay' \(WeightDecay with rate=0.1\) on rank 1",
    ),
    "hook of a rule": (
        lambda o: o.target.g.update_rule.add_hook(optimizer_hooks.GradientLARS(), timing="post"),
        "post hooks of the update rule of /g: none on ranks 0 and 2, 'GradientLARS'",
    ),
    "dynamic scale": (
        lambda o: o.loss_scaling(),
        "growth of the dynamic loss scale: none on",
    ),
    "static scale": (lambda o: o.set_loss_scale(8), "loss scale: None on ranks 0 and 2, 8 on"),
    "set-up": (
        lambda o: o.setup(o.target),
        r"calls of setup\(\): 1 on ranks 0 and 2, 2 on rank 1",
    ),
    "kept gradients": (
        lambda o: setattr(o, "keep_gradients", True),
        "keep_gradients: False on ranks 0 and 2, True on rank 1",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_fact_that_differs_is_named_with_ranks_and_values(what: str) -> None:
    configure, words = DIFFERENCES[what]
    with pytest.raises(RuntimeError, match=f"differ in what they must share: .*{words}"):
        train(3, on_rank_1(configure))


def test_the_same_number_in_another_type_is_no_difference() -> None:
    train(2, on_rank_1(lambda optimizer: setattr(optimizer, "lr", np.float64(0.001))))


class Hook:
    """A hook of a user's that sees whole gradients."""

    name = "own"
    timing = "pre"
    call_for_each_param = False

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.calls = 0

    def __call__(self, optimizer: Any) -> None:
        self.calls += 1
        self.work(optimizer.target.g)


def test_a_hook_of_one_rank_that_only_looks_is_called(caplog: pytest.LogCaptureFixture) -> None:
    hook = Hook(lambda param: float(np.linalg.norm(param.grad)))
    train(2, on_rank_1(lambda optimizer: optimizer.add_hook(hook)))
    assert hook.calls == 2
    (said,) = [r.message for r in caplog.records if "may only look" in r.message]
    assert "pre hooks of the optimizer, on whole gradients: none on rank 0, 'own' (Hook)" in said


@pytest.mark.parametrize(
    ("timing", "work", "left"),
    [
        ("pre", lambda param: param.grad.fill(0), "after the pre hooks the gradient of /g"),
        ("pre", lambda param: param.array.fill(0), "after the pre hooks the array of /g"),
        ("post", lambda param: param.array.fill(0), "after the post hooks the array of /g"),
    ],
)
def test_a_hook_of_one_rank_that_touches_is_named(timing: str, work: Any, left: str) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.add_hook(Hook(work), timing=timing)

    with pytest.raises(RuntimeError, match=f"on some ranks alone: {left}.*'own'"):
        train(3, on_rank_1(configure))


def test_the_loss_scale_counts_where_a_rank_has_no_gradient() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SGD(0.1), collectives, step_after_broadcast=True
        ).setup(models.Model())
        optimizer.set_loss_scale(1024.0)
        for param in optimizer.target.params() if collectives.rank == 0 else ():
            param.grad = np.full_like(param.array, 1024)
            param._loss_scale = 1024.0
        before = optimizer.target.g.array.copy()
        optimizer.update()
        return before - optimizer.target.g.array

    for moved in run_ranks(2, run):
        np.testing.assert_allclose(moved, 0.05, rtol=1e-5)


def test_optimizers_that_are_updated_in_another_order_are_named() -> None:
    def run(collectives: ThreadCollectives) -> None:
        both = [
            create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives).setup(
                models.Model()
            )
            for _ in range(2)
        ]
        both[collectives.rank].update()

    with pytest.raises(RuntimeError, match=r"optimizer: number 1 of its communicator, .* number 2"):
        run_ranks(2, run)
