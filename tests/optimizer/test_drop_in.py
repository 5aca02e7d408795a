"""A sharded optimizer where one of Chainer's or ChainerMN's was: the same script, the same outcome.

A script takes what makes the optimizer and returns what it has observed. It runs with Chainer's
own SMORMS3 and, on every rank, with a sharded one that steps at its first update, too. All ranks
have the same gradients, of which the mean over one or two ranks is exact.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

from smorms3_dist import ShardedOptimizer, create_multi_node_optimizer

import chainer
import chainer.functions as F
import models
import pytest
from rank_threads import ThreadCollectives, run_ranks

Make = Callable[..., Any]

SHAPES: dict[str, models.Shape] = {"a": (3, 5), "b": (1,), "f": (0, 4), "g": (50, 9)}


def in_place_of_chainers(script: Callable[[Make], Any]) -> Any:
    """Runs a script in both ways; returns what it has observed, the same in both."""
    expected = script(chainer.optimizers.SMORMS3)

    def run(collectives: ThreadCollectives) -> Any:
        def make(**hyperparameters: float) -> Any:
            return create_multi_node_optimizer(
                chainer.optimizers.SMORMS3(**hyperparameters),
                collectives,
                step_after_broadcast=True,
            )

        return script(make)

    for world_size in (1, 2):
        assert run_ranks(world_size, run) == [expected] * world_size
    return expected


def set_up(make: Make, **hyperparameters: float) -> Any:
    optimizer = make(**hyperparameters)
    # So that set-up can be chained, as one writes it.
    assert optimizer.setup(models.Model(SHAPES)) is optimizer
    return optimizer


def parameters(optimizer: Any) -> dict[str, bytes]:
    return {name: models.bits(array) for name, array in models.arrays(optimizer.target).items()}


def outcome(call: Callable[[], Any]) -> str:
    """How a call ends: the error and its message, or what it returns."""
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def of_rules(optimizer: Any) -> set[tuple[float, float]]:
    hyperparameters = [param.update_rule.hyperparam for param in optimizer.target.params()]
    return {(one.lr, one.eps) for one in hyperparameters}


@pytest.mark.parametrize(
    ("given", "lr", "eps"),
    [({}, 0.001, 1e-16), ({"lr": 0.1}, 0.1, 1e-16), ({"lr": 0.5, "eps": 1e-8}, 0.5, 1e-8)],
)
def test_hyperparameters_given_and_set_later_reach_rules_without_their_own(
    given: dict[str, float], lr: float, eps: float
) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make, **given)
        seen = [optimizer.lr, optimizer.eps, optimizer.hyperparam.get_dict(), of_rules(optimizer)]
        models.train(optimizer, 0, range(2))
        optimizer.target.a.update_rule.hyperparam.lr = 0.75
        optimizer.lr = 0.25
        optimizer.hyperparam.eps = 1e-4
        seen += [optimizer.hyperparam.lr, optimizer.eps, of_rules(optimizer)]
        models.train(optimizer, 0, range(2))
        return seen, parameters(optimizer)

    seen, _ = in_place_of_chainers(script)
    later = [0.25, 1e-4, {(0.25, 1e-4), (0.75, 1e-4)}]
    assert seen == [lr, eps, {"lr": lr, "eps": eps}, {(lr, eps)}, *later]


def test_it_is_what_chainers_is_to_whoever_asks_by_isinstance_and_after_copies() -> None:
    kinds = [chainer.Optimizer, chainer.GradientMethod, chainer.optimizers.SMORMS3]
    others = [chainer.optimizers.Adam, chainer.UpdateRule, dict]

    def script(make: Make) -> Any:
        optimizer = set_up(make)
        copies = [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]
        return [
            [isinstance(each, kind) for kind in kinds + others] + [each.__class__.__name__]
            for each in (optimizer, *(make_copy(optimizer) for make_copy in copies))
        ]

    expected = [True, True, True, False, False, False, "SMORMS3"]
    assert in_place_of_chainers(script) == [expected] * 4


def test_it_says_itself_what_it_is_and_lists_what_it_has() -> None:
    def body(optimizer: Any, _: int) -> None:
        assert isinstance(optimizer, ShardedOptimizer)
        assert type(optimizer).__name__ == "ShardedOptimizer"
        assert {"check_sync", "gradients", "lr", "add_hook", "target"} <= set(dir(optimizer))
        empty = object.__new__(ShardedOptimizer)
        assert not isinstance(empty, chainer.Optimizer)

    models.on_ranks(1, body)


def test_what_cannot_be_registered_as_a_hook() -> None:
    def script(make: Make) -> Any:
        def hook(_: Any) -> None: ...

        optimizer = make()
        early = outcome(lambda: optimizer.add_hook(hook))
        optimizer.setup(models.Model(SHAPES))
        return [
            early,
            outcome(lambda: optimizer.add_hook(1)),
            outcome(lambda: optimizer.add_hook(hook, timing="never")),
            outcome(lambda: optimizer.add_hook(hook)),
            outcome(lambda: optimizer.add_hook(hook)),
            outcome(lambda: optimizer.remove_hook("hook")),
            outcome(lambda: optimizer.remove_hook("hook")),
        ]

    errors = [text.partition(":")[0] for text in in_place_of_chainers(script)]
    expected = ["RuntimeError", "TypeError", "ValueError", "None", "KeyError", "None", "KeyError"]
    assert errors == expected


@pytest.mark.parametrize("hooked", [False, True])
def test_a_loss_function_is_differentiated_with_the_loss_scale(hooked: bool) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make, lr=0.1)
        optimizer.set_loss_scale(8)
        target = optimizer.target
        seen: list[bytes] = []
        if hooked:
            optimizer.add_hook(lambda _: seen.append(models.bits(target.g.grad)), "noting")
        for step in range(3):
            optimizer.update(lambda c: F.sum((target.g - c) ** 2) + F.sum(target.a**3), float(step))
        return seen, parameters(optimizer)

    seen, after = in_place_of_chainers(script)
    untrained = models.arrays(models.Model(SHAPES))
    assert len(seen) == (3 if hooked else 0)
    assert seen[:1] == ([models.bits(8 * 2 * untrained["/g"])] if hooked else [])
    # Nothing leads from the loss to b; f is empty.
    assert [n for n, a in untrained.items() if models.bits(a) != after[n]] == ["/a", "/g"]


def noting(notes: list[Any]) -> Callable[[Any], None]:
    """A hook that notes the gradients that there are."""

    def note(optimizer: Any) -> None:
        grads = {name: param.grad for name, param in optimizer.target.namedparams()}
        notes.append({n: None if grad is None else models.bits(grad) for n, grad in grads.items()})

    return note


def test_after_a_hook_of_a_rule_has_cleared_a_gradient_there_are_zeros() -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make, lr=0.1)
        notes: list[Any] = []
        optimizer.add_hook(noting(notes), "noting", timing="post")
        optimizer.target.g.update_rule.add_hook(
            lambda _, param: param.cleargrad(), "clearing", timing="post"
        )
        models.train(optimizer, 0, range(3))
        return notes, parameters(optimizer)

    notes, after = in_place_of_chainers(script)
    assert [note["/g"] for note in notes] == [bytes(50 * 9 * 4)] * 3
    assert after["/g"] != models.bits(models.Model(SHAPES).g.array)


def test_a_hook_of_a_rule_may_give_its_parameter_another_array() -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make, lr=0.1)
        rule = optimizer.target.g.update_rule

        def halve(_: Any, param: Any) -> None:
            param.array = param.array / 2

        rule.add_hook(halve, "halving")
        models.train(optimizer, 0, range(3))
        halved = parameters(optimizer)
        rule.remove_hook("halving")
        rule.add_hook(halve, "halving", timing="post")
        models.train(optimizer, 0, range(3))
        return halved, parameters(optimizer)

    in_place_of_chainers(script)


@pytest.mark.filterwarnings("ignore:.*(zerograds?|use_cleargrads) is deprecated")
def test_zeros_that_the_loss_scale_of_another_optimizer_has_left_do_not_count() -> None:
    def script(make: Make) -> Any:
        first = set_up(make, lr=0.1)
        target = first.target
        first.set_loss_scale(8)
        first.update(lambda: F.sum(target.a**2) + F.sum(target.g**2))
        second = make(lr=0.1).setup(target)
        second.use_cleargrads(False)
        notes: list[Any] = []
        second.add_hook(noting(notes), "noting", timing="post")
        # Nothing leads to a.
        second.update(lambda: F.sum(target.g**3))
        return notes, parameters(second)

    in_place_of_chainers(script)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.loss_scaling(scale=-1), "loss_scale must be a positive number. Actual: -1"),
        (lambda o: o.loss_scaling(scale=0), "loss_scale must be a positive number. Actual: 0"),
        (lambda o: o.loss_scaling(interval=0), "interval must be greater than or equal to 1."),
        (lambda o: o.new_epoch(auto=True), "use_auto_new_epoch"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[Any], None], message: str) -> None:
    assert message in in_place_of_chainers(lambda make: outcome(lambda: call(set_up(make))))


def test_epochs_are_counted_by_whoever_has_said_so() -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make)
        seen = []
        for automatic in (False, True):
            optimizer.use_auto_new_epoch = automatic
            for auto in (False, True):
                error = outcome(functools.partial(optimizer.new_epoch, auto=auto))
                seen.append((error.partition(":")[0], optimizer.epoch))
        optimizer.setup(models.Model(SHAPES))
        return seen, optimizer.epoch

    seen, afresh = in_place_of_chainers(script)
    assert seen == [("None", 1), ("RuntimeError", 1), ("RuntimeError", 1), ("None", 2)]
    assert afresh == 0


def test_rules_of_any_kind_are_given_their_parameter_and_its_mean_gradient_once_a_step() -> None:
    def body(optimizer: Any, rank: int) -> None:
        params = dict(optimizer.target.namedparams())
        optimizer.update()
        assert optimizer.t == 0
        assert not any(param.update_rule.update.called for param in params.values())
        models.train(optimizer, rank, [1])
        assert optimizer.t == 1
        for name, param in params.items():
            param.update_rule.update.assert_called_once_with(param)
            grads = [models.gradient(name, param, other, 1) for other in range(2)]
            assert models.bits(param.grad) == models.bits(models.mean_gradient(grads))
            assert models.bits(param.array) == models.bits(models.arrays(models.Model())[name])

    models.on_ranks(2, body, lambda: models.OwnOptimizer(MagicMock))
