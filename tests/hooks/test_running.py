"""Hooks: when they run, what they see, and which of them run on shards."""

from __future__ import annotations

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


def train_both_ways(
    world_size: int,
    gradients: str,
    configure: Callable[[Any], None],
    make_model: Callable[[], chainer.Link] = models.Model,
    gather: bool = False,
) -> tuple[chainer.Link, list[Any]]:
    """Trains by Chainer and sharded; with ``gather`` ours have the gradients of the last step."""

    def keeping(optimizer: Any) -> None:
        configure(optimizer)
        optimizer.keep_gradients = gather

    def finish(optimizer: Any) -> None:
        if gather:
            optimizer.gather_gradients()

    theirs = make_model()
    models.train_with_chainer(theirs, world_size, STEPS, configure)
    ours = models.train_sharded(world_size, make_model, STEPS, keeping, gradients, finish=finish)
    for optimizer in ours:
        assert optimizer.gradient_mode == gradients
        models.assert_same_bits(optimizer.target, ours[0].target)
    return theirs, ours


def assert_close(ours: chainer.Link, theirs: chainer.Link, which: str = "array") -> None:
    mine, expected = (
        np.concatenate([np.ravel(getattr(p, which)) for _, p in sorted(link.namedparams())])
        for link in (ours, theirs)
    )
    assert np.linalg.norm(expected) > 0
    assert np.linalg.norm(mine - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("timing", ["pre", "post"])
@pytest.mark.parametrize("world_size", [3, 5])
@pytest.mark.parametrize("hook", BY_NORM)
def test_norms_over_three_ranks_and_more_are_chainers_to_1e_6(
    hook: str, world_size: int, timing: str, gradients: str
) -> None:
    def of_optimizer(optimizer: Any) -> None:
        optimizer.add_hook(BY_NORM[hook](), timing=timing)

    def of_rules(optimizer: Any) -> None:
        for name in ("a", "c", "d", "g"):
            getattr(optimizer.target, name).update_rule.add_hook(BY_NORM[hook](), timing=timing)

    unhooked = models.Model()
    models.train_with_chainer(unhooked, world_size, STEPS)
    for configure in (of_optimizer, of_rules)[: 1 if hook == "GradientClipping" else 2]:
        theirs, ours = train_both_ways(world_size, gradients, configure, gather=True)
        assert_close(ours[0].target, theirs)
        # After the update a hook changes gradients, which nothing else looks at.
        assert np.array_equal(theirs.g.array, unhooked.g.array) == (timing == "post")
        assert not np.array_equal(theirs.g.grad, unhooked.g.grad)
        for optimizer in ours:
            assert_close(optimizer.target, theirs, "grad")


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_clipped_from_the_threshold_on(world_size: int) -> None:
    grads = [
        models.mean_gradient([models.gradient(name, param, rank, 1) for rank in range(world_size)])
        for name, param in models.Model().namedparams()
    ]
    norm = float(np.sqrt(sum(np.sum(np.square(grad, dtype="d")) for grad in grads)))
    assert norm > 100

    def trained(threshold: float) -> np.ndarray:
        def configure(optimizer: Any) -> None:
            optimizer.add_hook(optimizer_hooks.GradientClipping(threshold))

        theirs, sgd = models.Model(), chainer.optimizers.SGD
        models.train_with_chainer(theirs, world_size, [1], configure, make=sgd)
        ours = models.train_sharded(world_size, models.Model, [1], configure, make=sgd)
        for optimizer in ours:
            models.assert_same_bits(optimizer.target, theirs)
        return theirs.g.array

    free = trained(float("inf"))
    assert np.array_equal(trained(norm * 1.001), free)
    assert not np.array_equal(trained(norm * 0.999), free)


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
        assert_close(ours[0].target, theirs)
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


def test_gradient_clipping_on_a_rule_fails_as_by_chainer() -> None:
    def configure(optimizer: Any) -> None:
        optimizer.target.g.update_rule.add_hook(optimizer_hooks.GradientClipping(0.5))

    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        models.train_with_chainer(models.Model(), 1, STEPS, configure)
    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        models.train_sharded(1, models.Model, STEPS, configure)


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
