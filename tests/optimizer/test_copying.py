"""Copies and pickles of a sharded optimizer, and the communicator that a restored one is given."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks

LAST = 6
SHAPES: dict[str, models.Shape] = {"a": (3, 5), "b": (1,), "c": (7,), "f": (0, 4), "g": (50, 9)}


# The rules of MSVAG change in the course of a training.
KINDS = {
    "SMORMS3": chainer.optimizers.SMORMS3,
    "MSVAG": chainer.optimizers.MSVAG,
    "float16 with masters": chainer.optimizers.SMORMS3,
}


def set_up(optimizer: Any, kind: str) -> Any:
    with_masters = kind == "float16 with masters"
    dtypes = dict.fromkeys("acg", "float16") if with_masters else {}
    optimizer.setup(models.Model(SHAPES, dtypes))
    if with_masters:
        optimizer.use_fp32_update()
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.01))
    optimizer.lr = 0.02
    return optimizer


def through_pickle(optimizer: Any) -> Any:
    restored = pickle.loads(pickle.dumps(optimizer))
    restored.communicator = optimizer.communicator
    return restored


DEEP: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": through_pickle}
COPIES: dict[str, Callable[[Any], Any]] = {"copy": copy.copy, **DEEP}


def train(optimizer: Any, rank: int, start: int, stop: int) -> None:
    for step in range(start, stop):
        models.train(optimizer, rank, [step])
        if step % 2:
            optimizer.new_epoch()


def facts(optimizer: Any) -> dict[str, Any]:
    """Everything of an optimizer that a training changes, on this rank."""
    laid_out = optimizer.layout is not None
    return {
        "counts": (optimizer.t, optimizer.epoch),
        "hyperparameters": optimizer.hyperparam.get_dict(),
        "hooks": list(optimizer._hookable._pre_update_hooks),
        "parameters": {name: models.bits(a) for name, a in models.arrays(optimizer.target).items()},
        "rules": {
            name: (param.update_rule.t, getattr(param.update_rule, "beta_power", None))
            for name, param in sorted(optimizer.target.namedparams())
        },
        "states": [
            {name: models.bits(state) for name, state in group.states.items()}
            for group in (optimizer.sharded_model.groups if laid_out else ())
        ],
    }


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("kind", "done"),
    # Before and after set-up, after the broadcast, in the middle.
    [("SMORMS3", None), ("SMORMS3", 0), ("SMORMS3", 1), *((kind, 3) for kind in KINDS)],
)
@pytest.mark.parametrize("make_copy", COPIES)
def test_a_copy_goes_on_bit_for_bit_and_a_deep_one_leaves_the_original_as_it_was(
    kind: str, make_copy: str, done: int | None, world_size: int
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        rank = collectives.rank
        original: Any = create_multi_node_optimizer(KINDS[kind](), collectives)
        reference: Any = create_multi_node_optimizer(KINDS[kind](), collectives)
        train(set_up(reference, kind), rank, 0, LAST)
        if done is None:
            twin = set_up(COPIES[make_copy](original), kind)
        else:
            train(set_up(original, kind), rank, 0, done)
            twin = COPIES[make_copy](original)
            before = facts(original)
        sent = collectives.bytes_sent["broadcast"]
        assert type(twin) is type(original)
        train(twin, rank, done or 0, LAST)
        assert facts(twin) == facts(reference)
        assert twin.gradient_mode == reference.gradient_mode == "sharded"
        assert twin.state_bytes() == reference.state_bytes() > 0
        if done and rank == 0:
            # The copy knows that the ranks have the same parameters already.
            assert collectives.bytes_sent["broadcast"] == sent
        for group in twin.sharded_model.groups:
            for param in group.buffers.params:
                assert param.size == 0 or np.shares_memory(param.array, group.buffers.flat)
        if make_copy in DEEP and done is not None:
            twin.lr = 0.5
            assert facts(original) == before != facts(twin)
            train(original, rank, done, LAST)
            assert facts(original) == facts(reference)

    run_ranks(world_size, run)


@pytest.mark.parametrize("done", [0, 1])
def test_a_copy_shares_target_and_states_but_not_the_count_as_a_copy_of_chainers_does(
    done: int,
) -> None:
    def alternate(optimizer: Any) -> tuple[int, int]:
        models.train(optimizer, 0, range(1, 1 + done))
        twin = copy.copy(optimizer)
        assert twin.target is optimizer.target
        for step in range(1 + done, 9):
            models.train(twin if step % 3 else optimizer, 0, [step])
        return optimizer.t, twin.t

    theirs = chainer.optimizers.SMORMS3().setup(models.Model())
    expected = alternate(theirs)

    def body(ours: Any, rank: int) -> None:
        # The same gradients on all ranks: two of them have an exact mean.
        assert alternate(ours) == expected
        models.assert_same_bits(ours.target, theirs.target)

    for world_size in (1, 2):
        models.on_ranks(world_size, body, step_after_broadcast=True)


def test_what_is_copied_together_stays_together() -> None:
    def body(optimizer: Any, rank: int) -> None:
        train(optimizer, rank, 0, 2)
        pair = (optimizer.target, optimizer)
        for model, twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
            assert twin.target is model is not optimizer.target
            assert model.g.update_rule.hyperparam.parent is twin.hyperparam
        # Nor does a pickle take the communicator from the original.
        assert optimizer.communicator is optimizer.collectives is not None
        train(optimizer, rank, 2, 4)

    models.on_ranks(2, body)


class Counter:
    """A hook that needs whole gradients, and counts its calls."""

    name = "counter"
    timing = "post"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, optimizer: Any) -> None:
        assert type(optimizer) is chainer.optimizers.SMORMS3
        assert all(param.grad is not None for param in optimizer.target.params())
        self.calls += 1


def halve(rule: Any, param: Any) -> None:
    param.grad *= 0.5


@pytest.mark.parametrize("make_copy", DEEP)
def test_hooks_of_optimizer_and_rules_go_with_a_deep_copy(make_copy: str) -> None:
    def body(optimizer: Any, rank: int) -> None:
        hook = Counter()
        optimizer.add_hook(hook)
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.5))
        optimizer.target.g.update_rule.add_hook(halve)
        train(optimizer, rank, 0, 3)
        assert hook.calls == 2
        twin = DEEP[make_copy](optimizer)
        train(twin, rank, 3, 5)
        assert hook.calls == 2
        assert twin._hookable._post_update_hooks["counter"].calls == 4
        train(optimizer, rank, 3, 5)
        assert facts(twin) == facts(optimizer)
        assert twin.gradient_mode == "replicated"
        twin.remove_hook("counter")
        with pytest.raises(KeyError):
            twin.remove_hook("counter")
        optimizer.remove_hook("counter")

    models.on_ranks(2, body)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("make_copy", COPIES)
def test_what_the_user_chose_goes_with_a_copy(make_copy: str, gradients: str) -> None:
    def body(optimizer: Any, rank: int) -> None:
        optimizer.lr, optimizer.keep_gradients = 0.5, True
        optimizer.set_loss_scale(4.0)
        twin = COPIES[make_copy](optimizer)
        assert (twin.lr, twin._loss_scale) == (0.5, 4.0)
        assert (twin.zero_fill, twin.gradients) == (False, gradients)
        assert twin.step_after_broadcast is twin.keep_gradients is True
        assert twin.communicator is optimizer.communicator
        train(twin, rank, 0, 1)
        assert (twin.t, twin.gradient_mode) == (1, gradients)
        twin.gather_gradients()

    models.on_ranks(2, body, zero_fill=False, gradients=gradients, step_after_broadcast=True)


class Lazy(chainer.Chain):
    """A layer that is created at the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        normal = chainer.initializers.Normal(0.3, rng=np.random.RandomState(0))
        with self.init_scope():
            self.l1 = L.Linear(None, 17, initialW=normal)
            self.l2 = L.Linear(17, 3, initialW=normal)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        return F.softmax_cross_entropy(self.l2(F.tanh(self.l1(x))), y)


@pytest.mark.parametrize("make_copy", DEEP)
@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_model_that_is_not_whole_yet_can_be_copied(done: int, make_copy: str) -> None:
    def learn(optimizer: Any, rank: int, steps: range) -> Any:
        for step in steps:
            rng = np.random.RandomState([rank, step])
            batch = rng.standard_normal((4, 6)).astype("f"), rng.randint(0, 3, 4).astype("i")
            optimizer.update(optimizer.target, *batch)
        return optimizer

    def body(original: Any, rank: int) -> None:
        learn(original, rank, range(done))
        twin = DEEP[make_copy](original)
        assert (twin.target.l1.W.array is None) == (done == 0)
        learn(twin, rank, range(done, LAST))
        learn(original, rank, range(done, LAST))
        models.assert_same_bits(twin.target, original.target)
        assert twin.t == original.t == LAST - 1

    models.on_ranks(2, body, make_model=Lazy)


def test_a_restored_optimizer_says_that_it_needs_a_communicator() -> None:
    for optimizer in models.train_sharded(2, models.Model, range(2)):
        restored = pickle.loads(pickle.dumps(optimizer))
        assert restored.communicator is None
        assert repr(restored) == "<ShardedOptimizer of SMORMS3, without a communicator>"
        assert restored.state_bytes() == optimizer.state_bytes() > 0
        models.set_gradients(restored.target, 0, 2)
        before = facts(restored)
        with pytest.raises(
            RuntimeError,
            match=r"restored from a pickle and has no communicator; assign one: "
            r"optimizer\.communicator = chainermn\.create_communicator",
        ):
            restored.update()
        assert facts(restored) == before == facts(optimizer)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize(
    ("size", "rank"), [(1, 0), (3, 1), (2, 0)], ids=["smaller", "larger", "another rank"]
)
def test_a_communicator_that_does_not_fit_the_shards_is_refused_before_anything_is_changed(
    size: int, rank: int, restored: bool
) -> None:
    other = run_ranks(size, lambda collectives: collectives)[rank]
    optimizers = models.train_sharded(2, models.Model, range(2))
    mine = pickle.loads(pickle.dumps(optimizers[1])) if restored else optimizers[1]
    communicator, before = mine.communicator, facts(mine)
    with pytest.raises(
        ValueError,
        match=rf"are shard 1 of 2, but in the new communicator this process is rank {rank} of "
        rf"{size}\. Use a communicator of the same size, in the same order",
    ):
        mine.communicator = other
    assert mine.communicator is communicator
    assert facts(mine) == before
    with pytest.raises(TypeError, match="is not a communicator"):
        mine.communicator = object()
    assert mine.communicator is communicator

    def go_on(collectives: ThreadCollectives) -> None:
        optimizer = [optimizers[0], mine][collectives.rank]
        optimizer.communicator = collectives
        train(optimizer, collectives.rank, 2, 4)

    run_ranks(2, go_on)
    expected = models.train_sharded(2, models.Model, range(4))
    for optimizer, reference in zip([optimizers[0], mine], expected, strict=True):
        models.assert_same_bits(optimizer.target, reference.target)


@pytest.mark.parametrize("world_size", [1, 3])
def test_before_the_first_update_any_communicator_fits(world_size: int) -> None:
    saved = models.on_ranks(2, lambda optimizer, rank: pickle.dumps(optimizer))[0]

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = pickle.loads(saved)
        optimizer.communicator = collectives
        optimizer.update()
        train(optimizer, collectives.rank, 0, 3)
        assert optimizer.layout.world_size == world_size
        return optimizer.target

    theirs = models.Model()
    models.train_with_chainer(theirs, world_size, range(3))
    for link in run_ranks(world_size, run):
        models.assert_same_bits(link, theirs)
