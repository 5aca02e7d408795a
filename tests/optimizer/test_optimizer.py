"""ShardedOptimizer in the place of a Chainer optimizer: attributes, hooks, epochs, refusals."""

from __future__ import annotations

import logging
from typing import Any

import smorms3_dist

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
import pytest
from chainer import training
from chainer.training import extensions


def test_the_public_names_are_those_of_the_package() -> None:
    for name in smorms3_dist.__all__:
        assert getattr(smorms3_dist, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = smorms3_dist.nothing


def test_attributes_are_read_from_and_written_to_the_actual_optimizer() -> None:
    def body(optimizer: Any, rank: int) -> None:
        actual = optimizer.actual_optimizer
        assert (optimizer.lr, optimizer.eps, optimizer.epoch) == (0.001, 1e-16, 0)
        optimizer.lr, optimizer.eps, optimizer.use_auto_new_epoch = 0.5, 1e-8, True
        assert (actual.lr, actual.eps, actual.use_auto_new_epoch) == (0.5, 1e-8, True)
        optimizer.t = 7
        assert actual.t == 7
        assert optimizer.target is actual.target
        assert isinstance(optimizer.create_update_rule(), chainer.optimizers.smorms3.SMORMS3Rule)
        assert not hasattr(optimizer, "nothing")
        assert repr(optimizer) == "<ShardedOptimizer of SMORMS3, rank 0 of 1>"
        # Updaters and extensions write `self._optimizer or ...`.
        assert bool(optimizer) is True

    models.on_ranks(1, body)


class Recorder:
    """Notes what it sees, and changes gradients, or clears them, so that its moment matters."""

    def __init__(self, name: str, timing: str, trace: list[Any]) -> None:
        self.name = name
        self.timing = timing
        self.trace = trace

    def __call__(self, optimizer: Any) -> None:
        params = dict(sorted(optimizer.target.namedparams()))
        self.trace.append((self.name, type(optimizer).__name__, optimizer.t))
        self.trace += [
            (name, models.bits(p.grad), models.bits(p.array)) for name, p in params.items()
        ]
        params["/a"].grad *= 0.5
        params["/c"].cleargrad()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_hooks_run_when_and_with_what_chainer_runs_them(world_size: int) -> None:
    def add_hooks(optimizer: Any, trace: list[Any]) -> None:
        optimizer.add_hook(Recorder("z", "post", trace))
        optimizer.add_hook(Recorder("b", "pre", trace))
        optimizer.add_hook(Recorder("a", "post", trace), timing="pre")
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))
        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.5))
        optimizer.add_hook(Recorder("removed", "pre", trace))
        optimizer.remove_hook("removed")

    expected: list[Any] = []
    theirs = models.Model()
    models.train_with_chainer(theirs, world_size, range(3), lambda o: add_hooks(o, expected))

    def body(optimizer: Any, rank: int) -> list[Any]:
        trace: list[Any] = []
        add_hooks(optimizer, trace)
        optimizer.update()
        models.train(optimizer, rank, range(3))
        assert optimizer.gradient_mode == "replicated"
        models.assert_same_bits(optimizer.target, theirs)
        return trace

    assert models.on_ranks(world_size, body) == [expected] * world_size


def test_a_hook_on_one_rank_makes_all_take_whole_gradients_and_rank_0_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def body(optimizer: Any, rank: int, hooked: tuple[int, ...]) -> str:
        if rank in hooked:
            optimizer.add_hook(lambda _: None, "nothing")
        models.train(optimizer, rank, range(3))
        return optimizer.gradient_mode

    with caplog.at_level(logging.WARNING, logger="smorms3_dist"):
        assert models.on_ranks(2, lambda o, rank: body(o, rank, (0, 1))) == ["replicated"] * 2
    assert caplog.messages == [
        "every rank receives whole gradients: the hook 'nothing' needs them (it is not known to "
        "treat each element of each parameter by itself: call_for_each_param and is_elementwise)"
    ]
    assert models.on_ranks(2, lambda o, rank: body(o, rank, (1,))) == ["replicated"] * 2


def test_sharded_gradients_with_a_hook_are_refused_before_anything_is_changed() -> None:
    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, range(3))
        optimizer.add_hook(lambda _: None, "nothing")
        before = {name: array.copy() for name, array in models.arrays(optimizer.target).items()}
        with pytest.raises(RuntimeError, match="the hook 'nothing' needs them"):
            optimizer.update()
        assert optimizer.t == 2
        for name, array in models.arrays(optimizer.target).items():
            np.testing.assert_array_equal(array, before[name])

    models.on_ranks(2, body, gradients="sharded")


def test_a_trainer_advances_epochs_and_its_extensions_find_what_they_read(tmp_path: Any) -> None:
    def body(optimizer: Any, rank: int) -> list[Any]:
        rng = np.random.RandomState(rank)
        data = [(x, np.int32(x.sum() > 0)) for x in rng.standard_normal((8, 3)).astype("f")]
        iterator = chainer.iterators.SerialIterator(data, 4)
        updater = training.updaters.StandardUpdater(iterator, optimizer)
        out = tmp_path / f"{world_size}-{rank}"
        trainer = training.Trainer(updater, (3, "epoch"), out=str(out))
        trainer.extend(extensions.ExponentialShift("lr", 0.5))
        trainer.extend(extensions.observe_lr())
        trainer.extend(extensions.FailOnNonNumber())
        log = extensions.LogReport()
        trainer.extend(log)
        trainer.run()
        return [optimizer.epoch, optimizer.t, [entry["lr"] for entry in log.log]]

    # Two iterations an epoch, the first of all of them broadcasts; the shift counts iterations.
    expected = [3, 5, [0.0005, 0.000125, 0.00003125]]
    for world_size in (1, 2):
        ends = models.on_ranks(world_size, body, make_model=lambda: L.Classifier(L.Linear(3, 2)))
        assert ends == [expected] * world_size


def test_the_loss_function_is_called_as_by_chainer() -> None:
    def body(optimizer: Any, rank: int) -> None:
        calls = []

        def loss(*args: Any, **kwds: Any) -> chainer.Variable:
            calls.append((args, kwds))
            return F.sum(optimizer.target.a)

        optimizer.update(loss, 1, two=2)
        assert calls == [((1,), {"two": 2})]

    models.on_ranks(1, body)


def test_state_bytes_of_all_ranks_add_up_to_three_states() -> None:
    parameters = sum(int(np.prod(shape)) for shape in models.SHAPES.values())
    for world_size in range(1, 6):
        optimizers = models.train_sharded(world_size, models.Model, [1])
        assert sum(optimizer.state_bytes() for optimizer in optimizers) == 12 * parameters
        arrays = [a for o in optimizers for u in o.sharded_model.groups for a in u.states.values()]
        assert sum(array.nbytes for array in arrays) == 12 * parameters
        # Chainer's own states are not there.
        assert all(p.update_rule.state is None for o in optimizers for p in o.target.params())
