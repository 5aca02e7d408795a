"""Copies and pickles of a sharded optimizer, and the communicator that a restored one is given."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Kind(NamedTuple):
    """What is trained."""

    make: Callable[[], chainer.GradientMethod]
    rate: str
    dtypes: dict[str, str]
    fp32_update: bool = False

    def optimizer(self, collectives: ThreadCollectives, gradients: str = "auto") -> Any:
        return create_multi_node_optimizer(self.make(), collectives, gradients=gradients)

    def set_up(self, optimizer: Any) -> Any:
        optimizer.setup(models.Model(SHAPES, self.dtypes))
        if self.fp32_update:
            optimizer.use_fp32_update()
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.01))
        setattr(optimizer, self.rate, 0.02)
        return optimizer


KINDS = {
    "SMORMS3": Kind(chainer.optimizers.SMORMS3, "lr", {}),
    "Adam": Kind(chainer.optimizers.Adam, "alpha", {}),
    # Its rules change in the course of a training.
    "MSVAG": Kind(chainer.optimizers.MSVAG, "lr", {}),
    "float16 with masters": Kind(
        chainer.optimizers.SMORMS3, "lr", dict.fromkeys("acg", "float16"), fp32_update=True
    ),
}


def through_pickle(optimizer: Any) -> Any:
    restored = pickle.loads(pickle.dumps(optimizer))
    restored.communicator = optimizer.communicator
    return restored


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
}
DEEP = {name: make for name, make in COPIES.items() if name != "copy"}

BEFORE_SETUP = "before setup"
MOMENTS = {BEFORE_SETUP: 0, "after setup": 0, "after the broadcast": 1, "in the middle": 3}
"""How many updates come before the copy."""


def train(optimizer: Any, rank: int, start: int, stop: int) -> None:
    for step in range(start, stop):
        models.set_gradients(optimizer.target, rank, step)
        optimizer.update()
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


CASES = [
    # All moments for one kind, and all kinds at one moment.
    *(("SMORMS3", moment) for moment in MOMENTS),
    *((kind, "in the middle") for kind in KINDS if kind != "SMORMS3"),
]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(("kind", "moment"), CASES)
@pytest.mark.parametrize("make_copy", COPIES)
def test_a_copy_goes_on_bit_for_bit_like_the_original(
    kind: str, make_copy: str, moment: str, world_size: int
) -> None:
    what, done = KINDS[kind], MOMENTS[moment]

    def run(collectives: ThreadCollectives) -> None:
        rank = collectives.rank
        reference = what.set_up(what.optimizer(collectives))
        train(reference, rank, 0, LAST)

        original = what.optimizer(collectives)
        if moment == BEFORE_SETUP:
            twin = what.set_up(COPIES[make_copy](original))
        else:
            what.set_up(original)
            train(original, rank, 0, done)
            twin = COPIES[make_copy](original)
        sent = collectives.bytes_sent["broadcast"]
        assert type(twin) is type(original)
        train(twin, rank, done, LAST)

        assert facts(twin) == facts(reference)
        assert twin.gradient_mode == reference.gradient_mode == "sharded"
        assert twin.state_bytes() == reference.state_bytes() > 0
        if done and rank == 0:
            # The copy knows that the ranks have the same parameters already.
            assert collectives.bytes_sent["broadcast"] == sent

    run_ranks(world_size, run)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("make_copy", DEEP)
@pytest.mark.parametrize("kind", KINDS)
def test_training_a_deep_copy_leaves_the_original_as_it_was(
    kind: str, make_copy: str, world_size: int
) -> None:
    what = KINDS[kind]

    def run(collectives: ThreadCollectives) -> None:
        original = what.set_up(what.optimizer(collectives))
        train(original, collectives.rank, 0, 3)
        twin = DEEP[make_copy](original)
        before = facts(original)
        setattr(twin, what.rate, 0.5)
        train(twin, collectives.rank, 3, LAST)
        assert facts(original) == before
        assert facts(twin)["parameters"] != before["parameters"]
        groups = original.sharded_model.groups, twin.sharded_model.groups
        assert groups[0]
        for mine, theirs in zip(*groups, strict=True):
            assert not np.shares_memory(mine.buffers.flat, theirs.buffers.flat)

        train(original, collectives.rank, 3, LAST)
        reference = what.set_up(what.optimizer(collectives))
        train(reference, collectives.rank, 0, LAST)
        assert facts(original) == facts(reference)

    run_ranks(world_size, run)


@pytest.mark.parametrize("make_copy", DEEP)
def test_parameters_of_a_deep_copy_are_views_of_its_own_flat_buffer(make_copy: str) -> None:
    for optimizer in models.train_sharded(2, models.Model, range(2)):
        twin = DEEP[make_copy](optimizer)
        flat = twin.sharded_model.groups[0].buffers.flat
        for param in twin.target.params():
            assert param.size == 0 or np.shares_memory(param.array, flat)


def test_a_copy_shares_target_and_states_but_not_the_count_as_a_copy_of_chainers_does() -> None:
    def alternate(optimizer: Any, steps: range) -> tuple[int, int]:
        models.set_gradients(optimizer.target, 0, steps[0])
        optimizer.update()
        twin = copy.copy(optimizer)
        assert twin.target is optimizer.target
        for step in steps[1:]:
            models.set_gradients(optimizer.target, 0, step)
            (twin if step % 3 else optimizer).update()
        return optimizer.t, twin.t

    theirs = chainer.optimizers.SMORMS3().setup(models.Model())
    expected = alternate(theirs, range(1, 9))

    def run(collectives: ThreadCollectives) -> Any:
        ours = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        ours.setup(models.Model()).update()
        # The same gradients on all ranks: two of them have an exact mean.
        assert alternate(ours, range(1, 9)) == expected
        return ours.target

    for world_size in (1, 2):
        for link in run_ranks(world_size, run):
            models.assert_same_bits(link, theirs.target)


def test_a_copy_from_before_the_first_update_shares_states_too() -> None:
    def train(optimizer: Any, twin: Any, rank: int, first: int) -> None:
        for step in range(first, 6):
            one = twin if step < 3 else optimizer
            models.set_gradients(one.target, rank, step)
            one.update()

    theirs = models.Model()
    plain = chainer.optimizers.SMORMS3().setup(theirs)
    train(plain, copy.copy(plain), 0, first=1)

    def run(collectives: ThreadCollectives) -> chainer.Link:
        model = models.Model()
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.setup(model)
        train(optimizer, copy.copy(optimizer), 0, first=0)
        return model

    for model in run_ranks(2, run):
        models.assert_same_bits(model, theirs)


@pytest.mark.parametrize("make_copy", DEEP)
def test_what_is_copied_together_stays_together(make_copy: str) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        model = models.Model()
        optimizer.setup(model)
        train(optimizer, collectives.rank, 0, 2)
        pair = (model, optimizer)
        twins = copy.deepcopy(pair) if make_copy == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert twins[1].target is twins[0] is not model
        assert twins[0].g.update_rule.hyperparam.parent is twins[1].hyperparam

    run_ranks(2, run)


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
    def run(collectives: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.setup(models.Model())
        hook = Counter()
        optimizer.add_hook(hook)
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.5))
        optimizer.target.g.update_rule.add_hook(halve)
        train(optimizer, collectives.rank, 0, 3)
        assert hook.calls == 2
        twin = DEEP[make_copy](optimizer)
        train(twin, collectives.rank, 3, 5)
        assert hook.calls == 2
        assert twin._hookable._post_update_hooks["counter"].calls == 4
        train(optimizer, collectives.rank, 3, 5)
        assert facts(twin) == facts(optimizer)
        assert twin.gradient_mode == "replicated"
        twin.remove_hook("counter")
        with pytest.raises(KeyError):
            twin.remove_hook("counter")
        optimizer.remove_hook("counter")

    run_ranks(2, run)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("make_copy", COPIES)
def test_what_the_user_chose_goes_with_a_copy(make_copy: str, gradients: str) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(lr=0.5, eps=1e-8),
            collectives,
            zero_fill=False,
            gradients=gradients,
            step_after_broadcast=True,
        ).setup(models.Model())
        optimizer.keep_gradients = True
        optimizer.set_loss_scale(4.0)
        twin = COPIES[make_copy](optimizer)
        assert (twin.lr, twin.eps, twin._loss_scale) == (0.5, 1e-8, 4.0)
        assert (twin.zero_fill, twin.gradients) == (False, gradients)
        assert twin.step_after_broadcast is twin.keep_gradients is True
        assert twin.communicator is collectives
        train(twin, collectives.rank, 0, 1)
        assert (twin.t, twin.gradient_mode) == (1, gradients)
        twin.gather_gradients()

    run_ranks(2, run)


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
    def learn(optimizer: Any, rank: int, steps: range) -> None:
        for step in steps:
            rng = np.random.RandomState([rank, step])
            batch = rng.standard_normal((4, 6)).astype("f"), rng.randint(0, 3, 4).astype("i")
            optimizer.update(optimizer.target, *batch)

    def run(collectives: ThreadCollectives) -> None:
        reference, original = (
            create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives).setup(Lazy())
            for _ in range(2)
        )
        learn(reference, collectives.rank, range(LAST))
        learn(original, collectives.rank, range(done))
        twin = DEEP[make_copy](original)
        assert (twin.target.l1.W.array is None) == (done == 0)
        learn(twin, collectives.rank, range(done, LAST))
        models.assert_same_bits(twin.target, reference.target)
        assert twin.t == reference.t == LAST - 1

    run_ranks(2, run)


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


def test_a_pickle_does_not_take_the_communicator_from_the_original() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.setup(models.Model())
        train(optimizer, collectives.rank, 0, 2)
        pickle.dumps(optimizer)
        assert optimizer.communicator is optimizer.collectives is collectives
        train(optimizer, collectives.rank, 2, 4)

    run_ranks(2, run)


def everybodys_collectives(world_size: int) -> list[ThreadCollectives]:
    return run_ranks(world_size, lambda collectives: collectives)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize(
    ("size", "rank"), [(1, 0), (3, 1), (2, 0)], ids=["smaller", "larger", "another rank"]
)
def test_a_communicator_that_does_not_fit_the_shards_is_refused_before_anything_is_changed(
    size: int, rank: int, restored: bool
) -> None:
    other = everybodys_collectives(size)[rank]
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

    def go_on(collectives: ThreadCollectives) -> Any:
        optimizer = [optimizers[0], mine][collectives.rank]
        optimizer.communicator = collectives
        train(optimizer, collectives.rank, 2, 4)
        return optimizer.target

    expected = models.train_sharded(2, models.Model, range(4))
    for link, reference in zip(run_ranks(2, go_on), expected, strict=True):
        models.assert_same_bits(link, reference.target)


@pytest.mark.parametrize("world_size", [1, 3])
def test_before_the_first_update_any_communicator_fits(world_size: int) -> None:
    def save(collectives: ThreadCollectives) -> bytes:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        return pickle.dumps(optimizer.setup(models.Model()))

    saved = run_ranks(2, save)[0]

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
