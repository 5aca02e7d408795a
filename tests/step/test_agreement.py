"""What ranks tell each other before a step: flags come through, differences are named."""

from __future__ import annotations

import functools
import operator
from typing import Any, ClassVar

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.step import agreement
from smorms3_dist.step.agreement import NO_FLAGS, Flag, agree, meet

import chainer
import models
import pytest
from chainer import optimizer_hooks
from hypothesis import given
from hypothesis import strategies as st
from rank_threads import ThreadCollectives, run_ranks

flags = st.lists(st.sampled_from([f for f in Flag if f is not Flag.BETWEEN_STEPS])).map(
    lambda several: functools.reduce(operator.or_, several, NO_FLAGS)
)
digests = st.integers(0, 0xFFFFFF)


class Rank(ThreadCollectives):
    """A rank that hears the words of those that have spoken before it."""

    def __init__(self, words: list[int]) -> None:
        self.words = words

    def all_reduce_or(self, word: int) -> int:
        # It is sent as a signed integer of 64 bits.
        assert 0 <= word < 1 << 63
        self.words.append(word)
        return functools.reduce(operator.or_, self.words)

    def all_gather_object(self, mine: Any) -> list[Any]:
        raise Compared(mine)


class Compared(Exception):
    """The ranks have seen that they differ, and are about to find out how."""


class Digests:
    """In the place of zlib: the digest of a program is the number it consists of."""

    crc32: ClassVar[Any] = staticmethod(lambda text: int(text.decode().strip("(),'")))


@given(st.lists(flags, min_size=1, max_size=5), digests)
def test_flags_of_all_ranks_come_through_whatever_the_digest(
    of_ranks: list[Flag], digest: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "zlib", Digests)
        words: list[int] = []
        for own in of_ranks:
            found = agree(own, (str(digest),), (), Rank(words))
        assert found == functools.reduce(operator.or_, of_ranks) | Flag.IN_STEP


@given(flags, flags, digests, st.integers(1, 0xFFFFFF))
def test_any_two_digests_that_differ_are_noticed(
    first: Flag, second: Flag, mine: int, difference: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "zlib", Digests)
        for differs in (difference, *(1 << bit for bit in range(24))):
            words: list[int] = []
            agree(first, (str(mine),), (), Rank(words))
            with pytest.raises(Compared):
                agree(second, (str(mine ^ differs),), (), Rank(words))


def test_nothing_to_agree_on_differs_from_something() -> None:
    words: list[int] = []
    agree(NO_FLAGS, (), (), Rank(words))
    with pytest.raises(Compared):
        agree(NO_FLAGS, ("a hook",), (), Rank(words))


def test_all_ranks_may_meet_between_steps_but_not_in_one() -> None:
    def all_meet(collectives: ThreadCollectives) -> Flag:
        return meet(collectives, Flag.LAY_OUT if collectives.rank else NO_FLAGS)

    assert run_ranks(2, all_meet) == [Flag.LAY_OUT | Flag.BETWEEN_STEPS] * 2

    def one_steps(collectives: ThreadCollectives) -> None:
        if collectives.rank:
            meet(collectives)
        else:
            agree(NO_FLAGS, (), (), collectives)

    with pytest.raises(RuntimeError, match=r"some ranks save or load .* while others make a step"):
        run_ranks(2, one_steps)


@pytest.mark.parametrize(
    ("configure", "difference"),
    [
        (
            lambda optimizer: optimizer.add_hook(optimizer_hooks.GradientClipping(1.0)),
            r"rank 1 has pre hook 'GradientClipping' \(GradientClipping\)\.",
        ),
        (
            lambda optimizer: optimizer.target.g.update_rule.add_hook(
                optimizer_hooks.GradientLARS(), timing="post"
            ),
            r"rank 1 has post hook 'GradientLARS' \(GradientLARS\) of the update rule of /g",
        ),
        (lambda optimizer: optimizer.loss_scaling(), "rank 1 has dynamic loss scaling"),
    ],
)
def test_ranks_that_would_wait_for_each_other_are_told_how_they_differ(
    configure: Any, difference: str
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        model = models.Model()
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives).setup(
            model
        )
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
        if collectives.rank == 1:
            configure(optimizer)
        optimizer.update()

    with pytest.raises(RuntimeError, match=r"rank 0 has nothing more, .* and " + difference):
        run_ranks(3, run)


def test_a_rule_disabled_on_one_rank_only_is_named_if_its_hook_communicates() -> None:
    def run(collectives: ThreadCollectives) -> None:
        model = models.Model()
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives).setup(
            model
        )
        model.a.update_rule.add_hook(optimizer_hooks.GradientLARS())
        model.a.update_rule.enabled = collectives.rank == 0
        optimizer.update()

    with pytest.raises(RuntimeError, match="of the disabled update rule of /a"):
        run_ranks(2, run)
