"""What trainers, their extensions and users reach of a Chainer optimizer, through the sharded one.

Learning rates that extensions shift, gradients that they read after a step, and the methods of
`chainer.GradientMethod` that nothing here overrides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import smorms3_dist
from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.extensions import stop_together

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
import pytest
from chainer import training
from chainer.training import extensions
from rank_threads import ThreadCollectives, run_ranks

ITERATIONS = 9


class Net(chainer.Chain):
    """Two layers, of which the second is created lazily; the same values on every rank."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.RandomState(0)

        def initializer(array: np.ndarray) -> None:
            array[...] = rng.standard_normal(array.shape) * 0.3

        with self.init_scope():
            self.l1 = L.Linear(6, 17, initialW=initializer)
            self.l2 = L.Linear(None, 3, initialW=initializer)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        return F.softmax_cross_entropy(self.l2(F.tanh(self.l1(x))), y)


def data_of(rank: int) -> list[tuple[np.ndarray, np.int32]]:
    rng = np.random.RandomState([7, rank])
    xs = rng.standard_normal((20, 6)).astype("f")
    return [(x, np.int32(i % 3)) for i, x in enumerate(xs)]


def new_trainer(optimizer: Any, data: Any, out: Path) -> training.Trainer:
    iterator = chainer.iterators.SerialIterator(data, 4, shuffle=False)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    return training.Trainer(updater, (ITERATIONS, "iteration"), out=str(out))


def run_with(
    optimizer: Any, rank: int, extend: Callable[[Any, Any], None], out: Path
) -> tuple[list[dict[str, Any]], chainer.Link]:
    """Trains with extensions; returns what was logged at each iteration, and the model."""
    trainer = new_trainer(optimizer, data_of(rank), out / str(rank))
    extend(trainer, optimizer)
    log = extensions.LogReport(trigger=(1, "iteration"))
    trainer.extend(extensions.observe_lr(), trigger=(1, "iteration"))
    trainer.extend(log)
    trainer.run()
    assert len(log.log) == ITERATIONS
    return log.log, optimizer.target


def new_optimizer(collectives: ThreadCollectives, **options: Any) -> Any:
    return create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives, **options)


def run_sharded_with(
    world_size: int, gradients: str, extend: Callable[[Any, Any], None], out: Path
) -> list[tuple[list[dict[str, Any]], chainer.Link]]:
    def run(collectives: ThreadCollectives) -> Any:
        # As many steps as by Chainer.
        optimizer = new_optimizer(collectives, gradients=gradients, step_after_broadcast=True)
        where = out / f"{gradients}-{world_size}"
        return run_with(optimizer.setup(Net()), collectives.rank, extend, where)

    return run_ranks(world_size, run)


SHIFTS = {
    "ExponentialShift": lambda _: extensions.ExponentialShift("lr", 0.7, init=0.02, target=0.003),
    "LinearShift": lambda _: extensions.LinearShift("lr", (0.001, 0.03), (2, 6)),
    "InverseShift": lambda _: extensions.InverseShift("lr", 0.5, 0.75, init=0.02),
    "MultistepShift": lambda _: extensions.MultistepShift("lr", 0.1, [3, 7], 0.02),
    "of the optimizer itself": lambda opt: extensions.ExponentialShift("lr", 0.5, optimizer=opt),
}


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shifted_learning_rate_counts_at_every_step_as_by_chainer(
    shift: str, tmp_path: Path
) -> None:
    def extend(trainer: Any, optimizer: Any) -> None:
        trainer.extend(SHIFTS[shift](optimizer))

    plain = chainer.optimizers.SMORMS3().setup(Net())
    expected, theirs = run_with(plain, 0, extend, tmp_path / "chainer")
    rates = [entry["lr"] for entry in expected]
    assert len(set(rates)) > 2
    for world_size in (1, 2):
        logs, links = zip(*run_sharded_with(world_size, "auto", extend, tmp_path), strict=True)
        assert [[entry["lr"] for entry in log] for log in logs] == [rates] * world_size
        models.assert_same_bits(links[-1], theirs if world_size == 1 else links[0])


def test_every_hyperparameter_can_be_set_between_steps() -> None:
    def train(optimizer: Any, rank: int, steps: range) -> chainer.Link:
        for step in steps:
            optimizer.lr, optimizer.eps = 0.02 / (step + 1), 10.0 ** -(step + 3)
            models.set_gradients(optimizer.target, rank, step)
            optimizer.update()
        assert (optimizer.hyperparam.lr, optimizer.hyperparam.eps) == (optimizer.lr, optimizer.eps)
        return optimizer.target

    theirs = train(chainer.optimizers.SMORMS3().setup(models.Model()), 0, range(1, 5))

    def run(collectives: ThreadCollectives) -> chainer.Link:
        # The same gradients on all ranks: two of them have an exact mean.
        return train(new_optimizer(collectives).setup(models.Model()), 0, range(5))

    for world_size in (1, 2):
        for ours in run_ranks(world_size, run):
            models.assert_same_bits(ours, theirs)


def test_fail_on_non_number_stops_every_rank_at_the_same_step(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> int:
        data = data_of(collectives.rank)
        if collectives.rank == 1:
            # In the third batch.
            data[9][0][2] = np.nan
        optimizer = new_optimizer(collectives).setup(Net())
        trainer = new_trainer(optimizer, data, tmp_path / str(collectives.rank))
        trainer.extend(extensions.FailOnNonNumber())
        with pytest.raises(RuntimeError, match="parameters in optimizer 'main' diverge"):
            trainer.run(show_loop_exception_msg=False)
        return trainer.updater.iteration

    assert run_ranks(2, run) == [3, 3]


class GatherGradients(training.Extension):
    """Makes whole mean gradients of a step before other extensions read them."""

    trigger = (1, "iteration")
    priority = training.PRIORITY_WRITER + 1

    def __call__(self, trainer: Any) -> None:
        trainer.updater.get_optimizer("main").gather_gradients()


def statistics(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    wanted = ("/data/", "/grad/")
    return [{k: v for k, v in entry.items() if any(w in k for w in wanted)} for entry in log]


def add_statistics(trainer: Any, optimizer: Any) -> None:
    if getattr(optimizer, "collectives", None) is None or optimizer.collectives.rank == 0:
        trainer.extend(extensions.ParameterStatistics(optimizer.target, trigger=(1, "iteration")))


def keep_and_gather(trainer: Any, optimizer: Any) -> None:
    optimizer.keep_gradients = True
    trainer.extend(GatherGradients())
    add_statistics(trainer, optimizer)


def test_parameter_statistics_of_kept_or_replicated_gradients_are_chainers(tmp_path: Path) -> None:
    plain = chainer.optimizers.SMORMS3().setup(Net())
    expected = statistics(run_with(plain, 0, add_statistics, tmp_path / "chainer")[0])
    # Of each of 4 parameters: data and grad; 5 numbers and 7 percentiles.
    assert [len(entry) for entry in expected] == [4 * 2 * 12] * ITERATIONS
    for world_size in (1, 2):
        (kept, _), *others = run_sharded_with(world_size, "sharded", keep_and_gather, tmp_path)
        (replicated, _), *_ = run_sharded_with(world_size, "replicated", add_statistics, tmp_path)
        assert statistics(kept) == statistics(replicated)
        # The mean of two ranks is not the gradient of one, and only rank 0 has the extension.
        assert (statistics(kept) == expected) == (world_size == 1)
        assert [statistics(log) for log, _ in others] == [[{}] * ITERATIONS] * (world_size - 1)


def half_model() -> models.Model:
    shapes = {name: shape for name, shape in models.SHAPES.items() if shape}
    return models.Model(shapes, {"a": "float16", "g": "float16"})


def test_parameter_statistics_alone_let_gradients_be_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (auto, _), (replicated, _) = (
        run_sharded_with(2, mode, add_statistics, tmp_path)[0] for mode in ("auto", "replicated")
    )
    assert statistics(auto) == statistics(replicated)
    assert "the extension parameter_statistics reads them after each step" in caplog.text


def with_masters(optimizer: Any) -> None:
    optimizer.use_fp32_update()
    with_a_loss_scale(optimizer)


def with_a_loss_scale(optimizer: Any) -> None:
    optimizer.set_loss_scale(96.0)
    for param in optimizer.target.params():
        # As a backward pass with that scale leaves it.
        param._loss_scale = 96.0


def with_everything(optimizer: Any) -> None:
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))
    with_a_loss_scale(optimizer)
    model = optimizer.target
    model.g.update_rule.add_hook(chainer.optimizer_hooks.GradientHardClipping(-0.01, 0.01))
    # Chainer leaves their gradients scaled.
    model.a.update_rule.enabled = False
    model.c.update_rule = None


@pytest.mark.parametrize(
    ("configure", "make_model"),
    [
        (lambda optimizer: None, models.Model),
        (with_a_loss_scale, models.Model),
        (with_everything, models.Model),
        (with_masters, half_model),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gather_gradients_gives_every_rank_what_chainer_leaves(
    world_size: int, configure: Callable[[Any], None], make_model: Any
) -> None:
    """Those of masters stay scaled; and the training is what it is without."""
    theirs = make_model()
    models.train_with_chainer(theirs, world_size, range(1, 4), configure)

    def keep(optimizer: Any) -> None:
        configure(optimizer)
        optimizer.keep_gradients = True

    def gather(optimizer: Any, step: int = 0) -> None:
        # Not after the call that broadcasts; and more often changes nothing.
        for _ in range(0 if step == 1 else 2):
            optimizer.gather_gradients()

    optimizers = models.train_sharded(
        world_size, make_model, range(1, 4), keep, "sharded", before_step=gather, finish=gather
    )
    for optimizer in optimizers:
        models.assert_same_bits(optimizer.target, theirs)
        mine = dict(optimizer.target.namedparams())
        for name, param in theirs.namedparams():
            assert mine[name].grad.dtype == param.dtype
            assert models.bits(mine[name].grad) == models.bits(param.grad), name


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
def test_after_a_call_that_only_broadcasts_the_unused_gradients_are_averaged(
    gradients: str,
) -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model()
        optimizer = new_optimizer(collectives, gradients=gradients).setup(model)
        models.set_gradients(model, collectives.rank, 1)
        for param in model.params():
            param.grad *= 4
            param._loss_scale = 4.0
        optimizer.update()
        assert optimizer.gradient_mode is None
        mine = models.gradient("/g", model.g, collectives.rank, 1)
        np.testing.assert_array_equal(model.g.grad, 4 * mine)
        # More often changes nothing.
        for _ in range(2):
            optimizer.gather_gradients()
        return model

    for model in run_ranks(3, run):
        for name, param in model.namedparams():
            grads = [models.gradient(name, param, rank, 1) for rank in range(3)]
            np.testing.assert_array_equal(param.grad, models.mean_gradient(grads))


def test_gather_gradients_refuses_when_the_last_update_kept_none() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = new_optimizer(collectives)
        model = models.Model()

        def refuses() -> None:
            with pytest.raises(RuntimeError, match=r"did not keep them.*keep_gradients = True"):
                optimizer.gather_gradients()

        refuses()
        optimizer.setup(model)
        refuses()
        for keep in (True, True, False):
            optimizer.keep_gradients = keep
            models.set_gradients(model, collectives.rank, 1)
            optimizer.update()
            if keep:
                optimizer.gather_gradients()
        refuses()
        assert all(param.grad is None for param in model.params())

    run_ranks(2, run)


def test_gather_gradients_does_nothing_after_a_replicated_step() -> None:
    optimizers = models.train_sharded(2, models.Model, range(2), gradients="replicated")
    for optimizer in optimizers:
        grads = {name: param.grad for name, param in optimizer.target.namedparams()}
        before = {name: grad.copy() for name, grad in grads.items()}
        sent = dict(optimizer.collectives.bytes_sent)
        # It does not wait for the other rank either.
        optimizer.gather_gradients()
        assert dict(optimizer.collectives.bytes_sent) == sent
        for name, param in optimizer.target.namedparams():
            assert param.grad is grads[name]
            np.testing.assert_array_equal(param.grad, before[name])


def test_call_hooks_calls_them_with_the_actual_optimizer_as_chainer_does() -> None:
    def call_hooks(optimizer: Any, actual: Any) -> list[tuple[str, bool]]:
        calls: list[tuple[str, bool]] = []

        def clear(given: Any) -> None:
            calls.append(("clear", given is actual))
            given.target.c.cleargrad()

        optimizer.add_hook(clear)
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.5))
        optimizer.add_hook(lambda given: calls.append(("post", given is actual)), "post", "post")
        models.set_gradients(optimizer.target, 0, 0)
        optimizer.call_hooks("pre")
        optimizer.call_hooks("post")
        return calls

    reference = chainer.optimizers.SMORMS3().setup(models.Model())
    expected = call_hooks(reference, reference)
    assert expected == [("clear", True), ("post", True)]
    assert np.any(reference.target.c.grad)

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = new_optimizer(collectives).setup(models.Model())
        assert call_hooks(optimizer, optimizer.actual_optimizer) == expected
        return optimizer.target

    theirs = dict(reference.target.namedparams())
    for name, param in run_ranks(1, run)[0].namedparams():
        np.testing.assert_array_equal(param.grad, theirs[name].grad)


def test_reallocate_cleared_grads_gives_zeros_also_after_a_sharded_step() -> None:
    for optimizer in models.train_sharded(2, models.Model, range(2), gradients="sharded"):
        optimizer.target.a.grad = np.full((3, 5), 2.0, "f")
        optimizer.reallocate_cleared_grads()
        for name, param in optimizer.target.namedparams():
            expected = np.full(param.shape, 2.0 if name == "/a" else 0.0, "f")
            np.testing.assert_array_equal(param.grad, expected)
            assert param.grad.dtype == np.float32


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_use_cleargrads_is_deprecated_and_obeyed_as_by_chainer(
    world_size: int, gradients: str
) -> None:
    def train(optimizer: Any) -> chainer.Link:
        optimizer.setup(Net()).use_cleargrads(False)
        for step in range(4):
            # The same data on all ranks: two of them have an exact mean.
            rng = np.random.RandomState(step)
            batch = rng.standard_normal((4, 6)).astype("f"), rng.randint(0, 3, 4).astype("i")
            optimizer.update(optimizer.target, *batch)
        assert optimizer._use_cleargrads is False
        return optimizer.target

    def run(collectives: ThreadCollectives) -> chainer.Link:
        optimizer = new_optimizer(collectives, gradients=gradients, step_after_broadcast=True)
        link = train(optimizer)
        assert optimizer.actual_optimizer._use_cleargrads is False
        return link

    with pytest.warns(DeprecationWarning) as theirs_said:
        theirs = train(chainer.optimizers.SMORMS3())
    with pytest.warns(DeprecationWarning) as ours_said:
        links = run_ranks(world_size, run)
    expected = {str(warning.message) for warning in theirs_said}
    assert expected == {
        "GradientMethod.use_cleargrads is deprecated.",
        "Link.zerograds is deprecated. Use Link.cleargrads instead.",
        "Variable.zerograd is deprecated. Use Variable.cleargrad instead.",
    }
    assert {str(warning.message) for warning in ours_said} == expected
    for link in links:
        models.assert_same_bits(link, theirs)


@pytest.mark.parametrize("repeat", [True, False])
def test_training_ends_on_all_ranks_when_it_ends_on_one(repeat: bool, tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> tuple[int, int]:
        model = models.Model()
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.setup(model)
        # Rank 1 has 3 batches an epoch, the others have 5.
        data = np.arange(10 - 4 * (collectives.rank == 1), dtype=np.int32)
        iterator = chainer.iterators.SerialIterator(data, 2, repeat=repeat, shuffle=False)
        updater = training.StandardUpdater(
            iterator, optimizer, loss_func=lambda x: F.sum(model.g * model.g)
        )
        trainer = training.Trainer(updater, (1, "epoch"), out=str(tmp_path))
        trainer.extend(stop_together())
        trainer.run()
        optimizer.consolidate()
        return updater.iteration, optimizer.t

    assert run_ranks(3, run) == [(3, 2)] * 3


# Comparing ranks


def net_trainer(comm: ThreadCollectives, out: Path) -> tuple[training.Trainer, Any]:
    optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm).setup(Net())
    return new_trainer(optimizer, data_of(comm.rank), out / str(comm.rank)), optimizer


def write_at(iteration: int, rank: int, priority: int = 0) -> Any:
    """An extension that writes to a parameter of one rank."""

    @training.make_extension(trigger=(iteration, "iteration"), priority=priority)
    def write(trainer: training.Trainer) -> None:
        optimizer = trainer.updater.get_optimizer("main")
        if optimizer.collectives.rank == rank and trainer.updater.iteration == iteration:
            optimizer.target.l1.b.array[-1] += 1

    return write


FOUND = r"the ranks are not in sync \(t = {}\): parameter /l1/b, float32 of shape \(17,\), has one"


@pytest.mark.parametrize("every", [2, (2, "iteration")])
def test_ranks_are_compared_after_all_other_extensions(every: Any, tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> None:
        trainer, _ = net_trainer(comm, tmp_path)
        trainer.extend(smorms3_dist.extensions.check_sync(every=every))
        trainer.extend(write_at(4, rank=1, priority=-150))
        trainer.run()

    with pytest.raises(RuntimeError, match=FOUND.format(3)):
        run_ranks(3, run)


def test_a_training_in_sync_is_compared_at_each_trigger_and_at_both_ends(tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> list[int]:
        trainer, optimizer = net_trainer(comm, tmp_path)
        at = []
        compare = optimizer.check_sync

        def counted(*args: Any) -> None:
            at.append(trainer.updater.iteration)
            compare(*args)

        object.__setattr__(optimizer, "check_sync", counted)
        trainer.extend(smorms3_dist.extensions.check_sync(every=4))
        trainer.run()
        return at

    assert run_ranks(2, run) == [[4, 8, ITERATIONS]] * 2


def test_ranks_are_repaired_on_request(tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> chainer.Link:
        trainer, optimizer = net_trainer(comm, tmp_path)
        trainer.extend(smorms3_dist.extensions.check_sync(every=1, repair=True))
        trainer.extend(write_at(3, rank=0))
        trainer.run()
        return optimizer.target

    first, second = run_ranks(2, run)
    models.assert_same_bits(first, second)
    # The one that rank 0 had counts.
    assert abs(first.l1.b.array[-1]) > 0.5


def test_persistent_values_are_compared_on_request(tmp_path: Path) -> None:
    def run(comm: ThreadCollectives, persistent: bool) -> None:
        trainer, optimizer = net_trainer(comm, tmp_path)
        optimizer.target.add_persistent("mine", float(comm.rank))
        trainer.extend(smorms3_dist.extensions.check_sync(every=3, persistent=persistent))
        trainer.run()

    run_ranks(2, lambda comm: run(comm, False))
    with pytest.raises(RuntimeError, match="persistent value /mine"):
        run_ranks(2, lambda comm: run(comm, True))


def test_a_number_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="every must be a positive number"):
        smorms3_dist.extensions.check_sync(every=0)


AT_END: dict[str, Callable[[Path], Any]] = {
    "check_sync": lambda path: smorms3_dist.extensions.check_sync(every=(9, "epoch")),
    "snapshot": lambda path: smorms3_dist.extensions.snapshot(),
    "checkpoint": lambda path: smorms3_dist.ShardedCheckpoint(path / "c", every=(9, "epoch")),
}


@pytest.mark.parametrize("kind", AT_END)
def test_ranks_are_compared_at_the_end_of_the_training(kind: str, tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> None:
        trainer, _ = net_trainer(comm, tmp_path)
        trainer.extend(AT_END[kind](tmp_path), trigger=(9, "epoch"))
        trainer.extend(write_at(ITERATIONS, rank=1))
        trainer.run()

    with pytest.raises(RuntimeError, match=FOUND.format(ITERATIONS - 1)):
        run_ranks(2, run)


@pytest.mark.parametrize("kind", ["snapshot", "checkpoint"])
def test_the_comparison_can_be_left_out(kind: str, tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> None:
        trainer, _ = net_trainer(comm, tmp_path)
        trainer.extend(
            smorms3_dist.extensions.snapshot(check_sync=False)
            if kind == "snapshot"
            else smorms3_dist.ShardedCheckpoint(tmp_path / "c", check_sync=False),
            trigger=(ITERATIONS, "iteration"),
        )
        trainer.extend(write_at(ITERATIONS, rank=1))
        trainer.run()

    run_ranks(2, run)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", AT_END)
def test_after_an_exception_of_one_rank_no_rank_waits_for_it(
    kind: str, error: type[BaseException], tmp_path: Path
) -> None:
    ends: list[int] = []

    def run(comm: ThreadCollectives) -> None:
        trainer, _ = net_trainer(comm, tmp_path)
        trainer.extend(AT_END[kind](tmp_path), trigger=(9, "epoch"))

        @training.make_extension(trigger=(3, "iteration"))
        def fail(trainer: training.Trainer) -> None:
            if comm.rank == 0:
                raise error("mine")

        trainer.extend(fail)
        try:
            trainer.run()
        finally:
            ends.append(comm.rank)

    with pytest.raises(error, match="mine"):
        run_ranks(2, run, timeout=20)
    assert ends[0] == 0


def test_a_rank_that_ends_its_training_early_is_told_of(tmp_path: Path) -> None:
    def run(comm: ThreadCollectives) -> None:
        trainer, _ = net_trainer(comm, tmp_path)
        if comm.rank == 1:
            trainer.stop_trigger = training.get_trigger((5, "iteration"))
        trainer.extend(smorms3_dist.extensions.check_sync(every=(9, "epoch")))
        trainer.run()

    with pytest.raises(
        RuntimeError,
        match=r"rank 1 (is in .* at the end of its training|has ended its script)",
    ):
        run_ranks(2, run)
