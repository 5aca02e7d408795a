"""A sharded optimizer where one of Chainer's or ChainerMN's was: the same script, the same outcome.

A script takes what makes the optimizer and returns what it has observed. It runs with Chainer's
own SMORMS3 and, on every rank, with a sharded one that steps at its first update, too. All ranks
have the same gradients, of which the mean over one or two ranks is exact.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from collections.abc import Callable, Iterable
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import chainer.functions as F
import models
import mpirun
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks

Make = Callable[..., Any]

SHAPES: dict[str, models.Shape] = {"a": (3, 5), "b": (1,), "f": (0, 4), "g": (50, 9)}
WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2])


def in_place_of_chainers(world_size: int, script: Callable[[Make], Any]) -> Any:
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

    assert run_ranks(world_size, run) == [expected] * world_size
    return expected


def set_up(make: Make, **hyperparameters: float) -> Any:
    optimizer = make(**hyperparameters)
    # So that set-up can be chained, as one writes it.
    assert optimizer.setup(models.Model(SHAPES)) is optimizer
    return optimizer


def train(optimizer: Any, steps: Iterable[int]) -> None:
    for step in steps:
        models.set_gradients(optimizer.target, 0, step)
        optimizer.update()


def parameters(optimizer: Any) -> dict[str, bytes]:
    return {name: models.bits(array) for name, array in models.arrays(optimizer.target).items()}


def outcome(call: Callable[[], Any]) -> str:
    """How a call ends: the error and its message, or what it returns."""
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# Hyperparameters


def of_rules(optimizer: Any) -> set[tuple[float, float]]:
    hyperparameters = [param.update_rule.hyperparam for param in optimizer.target.params()]
    return {(one.lr, one.eps) for one in hyperparameters}


@WORLD_SIZES
@pytest.mark.parametrize(
    ("given", "lr", "eps"),
    [({}, 0.001, 1e-16), ({"lr": 0.1}, 0.1, 1e-16), ({"lr": 0.5, "eps": 1e-8}, 0.5, 1e-8)],
)
def test_hyperparameters_that_the_optimizer_is_made_with(
    given: dict[str, float], lr: float, eps: float, world_size: int
) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make, **given)
        seen = [optimizer.lr, optimizer.eps, optimizer.hyperparam.get_dict(), of_rules(optimizer)]
        train(optimizer, range(2))
        return seen, parameters(optimizer)

    seen, _ = in_place_of_chainers(world_size, script)
    assert seen == [lr, eps, {"lr": lr, "eps": eps}, {(lr, eps)}]


@WORLD_SIZES
def test_hyperparameters_that_are_set_later_reach_rules_without_their_own(world_size: int) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make)
        optimizer.target.a.update_rule.hyperparam.lr = 0.75
        optimizer.lr = 0.25
        optimizer.hyperparam.eps = 1e-4
        seen = [optimizer.hyperparam.lr, optimizer.eps, of_rules(optimizer)]
        train(optimizer, range(2))
        return seen, parameters(optimizer)

    seen, _ = in_place_of_chainers(world_size, script)
    assert seen == [0.25, 1e-4, {(0.25, 1e-4), (0.75, 1e-4)}]


# Hooks


class Witness:
    """A hook that notes what it sees of each parameter."""

    call_for_each_param = True

    def __init__(self, name: str, seen: list[Any]) -> None:
        self.name = name
        self.seen = seen

    def __call__(self, rule: Any, param: chainer.Parameter) -> None:
        assert rule is param.update_rule
        values, grad = models.bits(param.array), models.bits(param.grad)
        self.seen.append((self.name, rule.t, param.shape, values, grad))


@WORLD_SIZES
@pytest.mark.parametrize("how", ["timing", "auto"])
def test_a_hook_before_the_update_sees_old_values_and_one_after_it_new_ones(
    how: str, world_size: int
) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make, lr=0.1)
        seen: list[Any] = []
        before = parameters(optimizer)
        for name, timing in (("late", "post"), ("early", "pre")):
            witness: Any = Witness(name, seen)
            if how == "auto":
                witness.timing = timing
                optimizer.add_hook(witness, timing="auto")
            else:
                optimizer.add_hook(witness, timing=timing)
        train(optimizer, [1])
        return seen, before, parameters(optimizer)

    seen, before, after = in_place_of_chainers(world_size, script)
    assert before != after
    order = ["/a", "/b", "/f", "/g"]
    grads = {
        name: models.gradient(name, param, 0, 1) for name, param in named(models.Model(SHAPES))
    }
    assert seen == [
        (witness, t, SHAPES[name[1:]], values[name], models.bits(grads[name]))
        for witness, t, values in (("early", 0, before), ("late", 1, after))
        for name in order
    ]


def named(model: chainer.Link) -> list[tuple[str, chainer.Parameter]]:
    return sorted(model.namedparams())


@WORLD_SIZES
def test_a_hook_of_the_whole_optimizer_sees_its_count_and_its_target(world_size: int) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make)
        seen: list[Any] = []

        def note(given: Any) -> None:
            assert given.target is optimizer.target
            seen.append((given.t, given.lr))

        optimizer.add_hook(note, "before")
        optimizer.add_hook(note, "after", timing="post")
        train(optimizer, range(2))
        return seen

    assert in_place_of_chainers(world_size, script) == [(t, 0.001) for t in (0, 1, 1, 2)]


@WORLD_SIZES
def test_what_cannot_be_registered_as_a_hook(world_size: int) -> None:
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

    seen = in_place_of_chainers(world_size, script)
    errors = [text.partition(":")[0] for text in seen]
    expected = ["RuntimeError", "TypeError", "ValueError", "None", "KeyError", "None", "KeyError"]
    assert errors == expected


# Gradients


@WORLD_SIZES
@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_that_were_cleared_count_as_zeros(hooked: bool, world_size: int) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make, lr=0.1)
        sums: list[float] = []
        if hooked:
            optimizer.add_hook(
                lambda given: sums.extend(float(abs(p.grad).sum()) for p in given.target.params()),
                "summing",
            )
        history = [parameters(optimizer)]
        for step in (None, 1, None, 2):
            if step is None:
                optimizer.target.cleargrads()
                optimizer.update()
            else:
                train(optimizer, [step])
            history.append(parameters(optimizer))
        return history, [total > 0 for total in sums]

    history, sums = in_place_of_chainers(world_size, script)
    # Zeros move no parameter, but they do change the states that the last step starts from.
    moved = [old != new for old, new in itertools.pairwise(history)]
    assert moved == [False, True, False, True]
    # The empty parameter f has no gradient at any time.
    cleared, given = [False] * 4, [True, True, False, True]
    assert sums == ((cleared + given) * 2 if hooked else [])


@WORLD_SIZES
def test_a_gradient_that_a_hook_clears_is_zeros_for_the_next_hook(world_size: int) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make)
        seen: list[Any] = []
        optimizer.add_hook(lambda given: given.target.cleargrads(), "clearing")
        optimizer.add_hook(Witness("next", seen))
        train(optimizer, [1])
        return [grad for *_, grad in seen], parameters(optimizer)

    grads, after = in_place_of_chainers(world_size, script)
    assert grads == [bytes(4 * int(np.prod(shape))) for shape in SHAPES.values()]
    assert after == {name: models.bits(p.array) for name, p in named(models.Model(SHAPES))}


@WORLD_SIZES
@pytest.mark.parametrize("hooked", [False, True])
def test_a_loss_function_is_differentiated_with_the_loss_scale(
    hooked: bool, world_size: int
) -> None:
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

    seen, after = in_place_of_chainers(world_size, script)
    untrained = models.Model(SHAPES)
    assert len(seen) == (3 if hooked else 0)
    assert seen[:1] == ([models.bits(8 * 2 * untrained.g.array)] if hooked else [])
    moved = [name for name, p in named(untrained) if models.bits(p.array) != after[name]]
    # Nothing leads from the loss to b; f is empty.
    assert moved == ["/a", "/g"]


@WORLD_SIZES
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1}, "loss_scale must be a positive number. Actual: -1"),
        ({"scale": 0}, "loss_scale must be a positive number. Actual: 0"),
        ({"interval": 0}, "interval must be greater than or equal to 1. Actual: 0"),
    ],
)
def test_loss_scaling_that_makes_no_sense_is_refused(
    arguments: dict[str, float], message: str, world_size: int
) -> None:
    def script(make: Make) -> str:
        return outcome(lambda: set_up(make).loss_scaling(**arguments))

    assert in_place_of_chainers(world_size, script) == f"ValueError: {message}"


# Life of an optimizer


@WORLD_SIZES
def test_what_is_no_link_cannot_be_the_target(world_size: int) -> None:
    def script(make: Make) -> bool:
        refusal = outcome(lambda: make().setup("no link"))
        return refusal.startswith("TypeError") and "optimization target must be a link" in refusal

    assert in_place_of_chainers(world_size, script)


@WORLD_SIZES
def test_epochs_are_counted_by_whoever_has_said_so(world_size: int) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make)
        seen = []
        for automatic in (False, True):
            optimizer.use_auto_new_epoch = automatic
            for auto in (False, True):
                error = outcome(functools.partial(optimizer.new_epoch, auto=auto))
                seen.append((error, optimizer.epoch))
        optimizer.setup(models.Model(SHAPES))
        return seen, optimizer.epoch

    seen, afresh = in_place_of_chainers(world_size, script)
    errors = [error.partition(":")[0] for error, _ in seen]
    assert errors == ["None", "RuntimeError", "RuntimeError", "None"]
    assert [epoch for _, epoch in seen] == [1, 1, 1, 2]
    assert afresh == 0


@WORLD_SIZES
def test_a_pickled_optimizer_goes_on_with_a_target_of_its_own(world_size: int) -> None:
    def script(make: Make) -> Any:
        optimizer = set_up(make, lr=0.1)
        optimizer.target.a.update_rule.hyperparam.lr = 0.5
        train(optimizer, range(2))
        before = parameters(optimizer)
        restored = pickle.loads(pickle.dumps(optimizer))
        if hasattr(optimizer, "communicator"):
            restored.communicator = optimizer.communicator
        # The rules' hyperparameters still have the optimizer's behind them.
        restored.lr = 0.01
        train(restored, range(2, 4))
        assert parameters(optimizer) == before
        return restored.t, of_rules(restored), parameters(restored)

    t, rules, after = in_place_of_chainers(world_size, script)
    assert (t, rules) == (4, {(0.01, 1e-16), (0.5, 1e-16)})
    uninterrupted = set_up(chainer.optimizers.SMORMS3, lr=0.1)
    uninterrupted.target.a.update_rule.hyperparam.lr = 0.5
    train(uninterrupted, range(2))
    uninterrupted.lr = 0.01
    train(uninterrupted, range(2, 4))
    assert after == parameters(uninterrupted)


# On MPI ranks, over ChainerMN's communicator


def observed(world_size: int) -> list[dict[str, Any]]:
    return mpirun.run_worlds(2, "drop_in.py")[world_size]


@pytest.mark.mpi
@WORLD_SIZES
@pytest.mark.parametrize("update", ["in fp32", "in its own dtype"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_linear_model_learns_as_with_chainers(dtype: str, update: str, world_size: int) -> None:
    for values in observed(world_size):
        result = values["linear"][f"{dtype} {update}"]
        assert result["same_bits_as_chainers"]
        # With samples of their own on every rank.
        before, after = result["accuracy"]
        assert before < 0.7
        assert after > 0.9
        assert result["same_bits_on_all_ranks"]


@pytest.mark.mpi
@WORLD_SIZES
def test_rules_of_any_kind_are_given_their_parameter_and_its_mean_gradient_once_a_step(
    world_size: int,
) -> None:
    for values in observed(world_size):
        expected = [
            moment(0, "ab"),
            moment(1, "ab", mean=(world_size - 1) / 2),
        ]
        assert values["mocked"]["chainermn"] == expected
        assert values["mocked"]["smorms3_dist"] == expected


@pytest.mark.mpi
@WORLD_SIZES
def test_a_link_that_is_added_is_broadcast_after_a_second_set_up(world_size: int) -> None:
    for values in observed(world_size):
        expected = [
            moment(0, "ab"),
            moment(0, "abc"),
            moment(1, "abc", mean=(world_size - 1) / 2),
        ]
        assert values["growing"]["chainermn"] == expected
        assert values["growing"]["smorms3_dist"] == expected


@pytest.mark.mpi
@WORLD_SIZES
def test_a_model_that_has_grown_is_trained_as_by_chainermn(world_size: int) -> None:
    reports = observed(world_size)
    trained = reports[0]["trained"]["chainermn"]
    assert trained["t"] == 2
    for values in reports:
        assert values["trained"] == {"chainermn": trained, "smorms3_dist": trained}


def moment(t: int, links: str, mean: float | None = None) -> dict[str, Any]:
    """What the program notes after an update: where all values are those of rank 0.

    Args:
        t: The optimizer's count.
        links: The links of the model.
        mean: The mean over the ranks of their numbers, if a step has been made.
    """
    number = {f"/{link}/W": index for index, link in enumerate(links)}
    step = mean is not None
    return {
        "t": t,
        "values": {name: [index] for name, index in number.items()},
        "calls_with_the_parameter": {name: [True] if step else [] for name in number},
        "gradients": {name: [index + (mean or 0)] for name, index in number.items()}
        if step
        else {},
    }
