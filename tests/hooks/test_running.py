"""Hooks: when they run, what they see, and which of them run on shards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.device import memory

import chainer
import chainer.links as L
import models
import numpy as np
import pytest
from chainer import optimizer_hooks
from rank_threads import ThreadCollectives, run_ranks

MODES = ["sharded", "replicated"]
STEPS = range(1, 6)

ELEMENTWISE: dict[str, Callable[[], Any]] = {
    "WeightDecay": lambda: optimizer_hooks.WeightDecay(0.1),
    "Lasso": lambda: optimizer_hooks.Lasso(0.05),
    "GradientHardClipping": lambda: optimizer_hooks.GradientHardClipping(-0.5, 0.25),
}
BY_NORM: dict[str, Callable[[], Any]] = {
    "GradientClipping": lambda: optimizer_hooks.GradientClipping(0.5),
    "GradientLARS": lambda: optimizer_hooks.GradientLARS(weight_decay=0.01),
}
DETERMINISTIC = {**ELEMENTWISE, **BY_NORM}


def flattened(model: chainer.Link) -> np.ndarray:
    return np.concatenate([np.ravel(array) for array in models.arrays(model).values()])


def train_both_ways(
    world_size: int,
    gradients: str,
    configure: Callable[[Any], None],
    make_model: Callable[[], chainer.Link] = models.Model,
) -> tuple[chainer.Link, list[Any]]:
    theirs = make_model()
    models.train_with_chainer(theirs, world_size, STEPS, configure)
    ours = models.train_sharded(world_size, make_model, STEPS, configure, gradients)
    for optimizer in ours:
        assert optimizer.gradient_mode == gradients
        models.assert_same_bits(optimizer.target, ours[0].target)
    return theirs, ours


def assert_close(ours: list[Any], theirs: chainer.Link) -> None:
    mine, expected = flattened(ours[0].target), flattened(theirs)
    assert np.linalg.norm(mine - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("timing", ["pre", "post"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("hook", DETERMINISTIC)
def test_a_hook_of_chainers_on_the_optimizer(
    hook: str, world_size: int, timing: str, gradients: str
) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.add_hook(DETERMINISTIC[hook](), timing=timing)

    theirs, ours = train_both_ways(world_size, gradients, configure)
    if hook in BY_NORM and world_size > 2:
        assert_close(ours, theirs)
    else:
        models.assert_same_bits(ours[0].target, theirs)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("timing", ["pre", "post"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("hook", [name for name in DETERMINISTIC if name != "GradientClipping"])
def test_a_hook_of_chainers_on_update_rules(
    hook: str, world_size: int, timing: str, gradients: str
) -> None:
    def configure(optimizer: Any) -> None:
        for name in ("a", "c", "d", "g"):
            rule = getattr(optimizer.target, name).update_rule
            rule.add_hook(DETERMINISTIC[hook](), timing=timing)

    theirs, ours = train_both_ways(world_size, gradients, configure)
    if hook in BY_NORM and world_size > 2:
        assert_close(ours, theirs)
    else:
        models.assert_same_bits(ours[0].target, theirs)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_hooks_together_in_the_order_of_their_registration(
    world_size: int, gradients: str
) -> None:
    def configure(optimizer: Any) -> None:
        # Each order of these gives other values.
        optimizer.add_hook(optimizer_hooks.GradientLARS())
        optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
        optimizer.add_hook(optimizer_hooks.GradientClipping(0.25), name="again")
        optimizer.add_hook(optimizer_hooks.GradientHardClipping(-0.01, 0.02))
        optimizer.add_hook(optimizer_hooks.Lasso(0.001))
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.5), name="removed")
        optimizer.remove_hook("removed")
        rule = optimizer.target.g.update_rule
        rule.add_hook(optimizer_hooks.GradientLARS())
        rule.add_hook(optimizer_hooks.Lasso(0.01))
        rule.add_hook(optimizer_hooks.WeightDecay(0.1))
        optimizer.target.a.update_rule.add_hook(optimizer_hooks.Lasso(0.01))
        optimizer.target.a.update_rule.add_hook(optimizer_hooks.GradientLARS())

    theirs, ours = train_both_ways(world_size, gradients, configure)
    if world_size > 2:
        assert_close(ours, theirs)
    else:
        models.assert_same_bits(ours[0].target, theirs)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("kind", [chainer.optimizers.SMORMS3, chainer.optimizers.Adam])
def test_long_segments_are_worked_through_in_pieces(
    kind: Any, gradients: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.HostMemory, "block", 100)

    def configure(optimizer: Any) -> None:
        for hook in DETERMINISTIC.values():
            optimizer.add_hook(hook())
        optimizer.target.g.update_rule.add_hook(optimizer_hooks.GradientLARS())
        optimizer.target.g.update_rule.add_hook(optimizer_hooks.Lasso(0.01), timing="post")

    theirs = models.Model()
    models.train_with_chainer(theirs, 2, STEPS, configure, make=kind)
    for optimizer in models.train_sharded(2, models.Model, STEPS, configure, gradients, make=kind):
        models.assert_same_bits(optimizer.target, theirs)
        assert max(len(u.pieces) for u in optimizer.sharded_model.sharded_groups) > 100


@pytest.mark.parametrize("hook", DETERMINISTIC)
def test_a_shared_parameter_meets_a_hook_once_a_path(hook: str) -> None:
    theirs, ours = train_both_ways(
        2, "sharded", lambda optimizer: optimizer.add_hook(DETERMINISTIC[hook]()), models.Tied
    )
    models.assert_same_bits(ours[0].target, theirs)


@pytest.mark.parametrize("gradients", MODES)
def test_a_parameter_without_elements_counts_in_norms_by_its_dtype(gradients: str) -> None:
    def make() -> models.Model:
        return models.Model({"a": (33, 2), "b": (0,)}, {"b": "float64"})

    def make_large_steps() -> Any:
        # In which the last bit of a gradient shows.
        return chainer.optimizers.SGD(lr=1000.0)

    # A rate in float64 is rounded otherwise than one in float32, for most thresholds.
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):

        def configure(optimizer: Any, threshold: float = threshold) -> None:
            optimizer.add_hook(optimizer_hooks.GradientClipping(threshold))

        theirs = make()
        models.train_with_chainer(theirs, 2, STEPS, configure, make=make_large_steps)
        for optimizer in models.train_sharded(
            2, make, STEPS, configure, gradients, make=make_large_steps
        ):
            models.assert_same_bits(optimizer.target, theirs)


def test_hooks_pass_over_parameters_that_are_not_initialized_yet() -> None:
    def make() -> chainer.Chain:
        model = chainer.Chain(inner=models.Model(), lazy=L.Linear(None, 3))
        model.cleargrads()
        return model

    def configure(optimizer: Any) -> None:
        for hook in DETERMINISTIC.values():
            optimizer.add_hook(hook())

    theirs, ours = train_both_ways(2, "sharded", configure, make)
    models.assert_same_bits(ours[0].target.inner, theirs.inner)


@pytest.mark.parametrize("of_rules", [False, True])
def test_gradient_noise_at_one_rank_is_that_of_chainer(of_rules: bool) -> None:
    def configure(optimizer: Any) -> None:
        if of_rules:
            for param in optimizer.target.params():
                param.update_rule.add_hook(optimizer_hooks.GradientNoise(0.3))
        else:
            optimizer.add_hook(optimizer_hooks.GradientNoise(0.3))
        np.random.seed(7)

    for gradients in MODES:
        theirs, ours = train_both_ways(1, gradients, configure, listed_models)
        models.assert_same_bits(ours[0].target, theirs)


def listed_models() -> chainer.ChainList:
    """Links of which the names do not sort as they stand: ``/10/a`` comes before ``/2/a``."""
    shapes = {"z": (3, 5), "a": (7,)}
    return chainer.ChainList(
        *(
            models.Model(shapes, {"z": "float64" if index % 3 else "float32"}, seed=index)
            for index in range(12)
        )
    )


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("hook", BY_NORM)
def test_norms_are_summed_in_the_order_of_the_links(
    hook: str, world_size: int, gradients: str
) -> None:
    theirs, ours = train_both_ways(
        world_size,
        gradients,
        lambda optimizer: optimizer.add_hook(BY_NORM[hook]()),
        listed_models,
    )
    models.assert_same_bits(ours[0].target, theirs)


@pytest.mark.parametrize("gradients", MODES)
def test_gradient_noise_of_many_ranks_does_not_make_them_diverge(gradients: str) -> None:
    # The ranks draw from one generator here, in any order: each has noise of its own.
    theirs, ours = train_both_ways(
        3, gradients, lambda optimizer: optimizer.add_hook(optimizer_hooks.GradientNoise(0.3))
    )
    assert not np.array_equal(ours[0].target.g.array, theirs.g.array)


class Elementwise:
    """A user's hook that works element by element, in all the ways in which one may write that."""

    name = "Elementwise"
    call_for_each_param = True
    is_elementwise = True

    def __call__(self, rule: Any, param: Any) -> None:
        if param.array is None:
            return
        if param.name == "a":
            param.grad = param.grad * np.float32(0.5)
        elif param.name == "b":
            param.cleargrad()
        elif param.name == "c":
            param.array = np.asarray(param.array * np.float32(0.75))
        elif rule is not None and rule.t < 3:
            param.data[...] = np.clip(param.data, -1, 1)
            param.grad += param.data


@pytest.mark.parametrize("timing", ["pre", "post"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("of_rules", [False, True])
def test_a_users_hook_that_says_it_is_elementwise_runs_on_shards(
    of_rules: bool, world_size: int, timing: str
) -> None:
    def configure(optimizer: Any) -> None:
        if of_rules:
            for param in optimizer.target.params():
                param.update_rule.add_hook(Elementwise(), timing=timing)
        else:
            optimizer.target.g.update_rule = None
            optimizer.add_hook(Elementwise(), timing=timing)

    theirs, ours = train_both_ways(world_size, "sharded", configure)
    models.assert_same_bits(ours[0].target, theirs)
    assert all(param.grad is None for param in ours[0].target.params())


def test_a_hook_on_shards_sees_every_element_once_and_the_rule_itself() -> None:
    def run(collectives: ThreadCollectives) -> dict[str, list[np.ndarray]]:
        model = models.Model()
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives).setup(
            model
        )
        seen: dict[str, list[np.ndarray]] = {}

        def look(rule: Any, param: Any) -> None:
            assert rule is getattr(model, param.name).update_rule is param.update_rule
            assert param.array.shape == param.grad.shape
            seen.setdefault(param.name, []).append(np.ravel(param.grad).copy())

        look.is_elementwise = look.call_for_each_param = True  # type: ignore[attr-defined]
        optimizer.add_hook(look)
        optimizer.update()
        models.set_gradients(model, collectives.rank, 1)
        optimizer.update()
        assert optimizer.gradient_mode == "sharded"
        return seen

    seen_by_rank = run_ranks(3, run)
    for name, param in models.Model().namedparams():
        parts = [part for seen in seen_by_rank for part in seen.get(name[1:], [])]
        mean = models.mean_gradient([models.gradient(name, param, rank, 1) for rank in range(3)])
        if param.size:
            np.testing.assert_array_equal(np.concatenate(parts), np.ravel(mean))


def hook_without_a_word(rule: Any, param: Any) -> None:
    param.grad *= 0.5


class OncePerStep:
    """Says that it is elementwise, but receives the optimizer."""

    name = "OncePerStep"
    is_elementwise = True

    def __call__(self, optimizer: Any) -> None:
        for param in optimizer.target.params():
            param.grad *= 0.5


class CountedDecay(optimizer_hooks.WeightDecay):
    """A subclass with a call of its own, which may do anything."""

    def __call__(self, rule: Any, param: Any) -> None:
        param.grad *= 1 + np.linalg.norm(param.array)


def add_to_rule(hook: Any) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.target.g.update_rule.add_hook(hook, "own")


@pytest.mark.parametrize(
    ("configure", "who"),
    [
        (lambda optimizer: optimizer.add_hook(OncePerStep()), "the hook 'OncePerStep'"),
        (lambda optimizer: optimizer.add_hook(CountedDecay(0.1)), "the hook 'WeightDecay'"),
        (add_to_rule(hook_without_a_word), "the hook 'own' of the update rule of /g"),
        (
            lambda optimizer: optimizer.add_hook(
                optimizer_hooks.GradientNoise(0.1, lambda xp, shape, *_: xp.ones(shape, "f"))
            ),
            "the hook 'GradientNoise'",
        ),
    ],
)
def test_any_other_hook_has_whole_gradients_and_is_named(
    configure: Any, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = models.Model()
    models.train_with_chainer(theirs, 2, STEPS, configure)
    with caplog.at_level(logging.WARNING, logger="smorms3_dist"):
        for optimizer in models.train_sharded(2, models.Model, STEPS, configure):
            assert optimizer.gradient_mode == "replicated"
            models.assert_same_bits(optimizer.target, theirs)
    assert [message.partition(" needs them")[0] for message in caplog.messages] == [
        f"every rank receives whole gradients: {who}"
    ]
    with pytest.raises(RuntimeError, match=f"gradients='sharded' was asked for, but {who} needs"):
        models.train_sharded(2, models.Model, STEPS, configure, "sharded")


def test_a_subclass_of_a_hook_of_chainers_that_does_the_same_runs_on_shards() -> None:
    class Decay(optimizer_hooks.WeightDecay):
        name = "Decay"

    theirs, ours = train_both_ways(2, "sharded", lambda optimizer: optimizer.add_hook(Decay(0.1)))
    models.assert_same_bits(ours[0].target, theirs)


def test_gradient_clipping_on_a_rule_fails_as_by_chainer() -> None:
    configure = add_to_rule(optimizer_hooks.GradientClipping(0.5))
    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        models.train_with_chainer(models.Model(), 1, STEPS, configure)
    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        models.train_sharded(1, models.Model, STEPS, configure)


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


def test_registration_and_its_errors_are_chainers() -> None:
    (optimizer,) = models.train_sharded(1, models.Model, [1])
    decay = optimizer_hooks.WeightDecay(0.1)
    optimizer.add_hook(decay)
    with pytest.raises(KeyError, match="already exists"):
        optimizer.add_hook(decay, timing="post")
    optimizer.remove_hook("WeightDecay")
    with pytest.raises(KeyError):
        optimizer.remove_hook("WeightDecay")
    with pytest.raises(TypeError, match="callable"):
        optimizer.add_hook("nothing")
    with pytest.raises(ValueError, match="timing"):
        optimizer.add_hook(decay, timing="later")
    decay.timing = "later"
    with pytest.warns(UserWarning, match="defaulting timing to 'pre'"):
        optimizer.add_hook(decay)
    assert list(optimizer._hookable._pre_update_hooks) == ["WeightDecay"]
    fresh = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), optimizer.collectives)
    with pytest.raises(RuntimeError, match="not set up"):
        fresh.add_hook(decay)


@pytest.mark.parametrize("hook", DETERMINISTIC)
def test_hooks_on_shards_of_a_step_that_is_replicated_for_another_hook(hook: str) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.add_hook(lambda _: None, "nothing")
        optimizer.add_hook(DETERMINISTIC[hook]())
        if hook != "GradientClipping":
            optimizer.target.g.update_rule.add_hook(DETERMINISTIC[hook]())

    theirs, ours = train_both_ways(3, "replicated", configure)
    models.assert_same_bits(ours[0].target, theirs)


def test_hooks_with_a_rule_of_every_kind() -> None:
    def configure(optimizer: Any) -> None:
        model = optimizer.target
        model.a.update_rule = None
        model.b.update_rule = chainer.optimizers.adam.AdamRule()
        model.c.update_rule.enabled = False
        model.e.update_rule.is_elementwise = False
        for hook in DETERMINISTIC.values():
            optimizer.add_hook(hook())
        for name in ("b", "c", "e", "g"):
            rule = getattr(model, name).update_rule
            rule.add_hook(optimizer_hooks.GradientLARS())
            rule.add_hook(optimizer_hooks.WeightDecay(0.1), timing="post")

    for world_size in (1, 2):
        theirs, ours = train_both_ways(world_size, "sharded", configure)
        models.assert_same_bits(ours[0].target, theirs)
