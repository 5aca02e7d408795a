"""What rank 0 decides for all ranks: when a trigger fires, and when a training ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import smorms3_dist
from smorms3_dist.extensions import early_stopping_trigger
from smorms3_dist.optimizer.rank_zero import as_rank_zero

import chainer
import mpirun
import numpy as np
import pytest
from chainer import training
from chainer.iterators import SerialIterator
from chainer.serializers import load_npz, save_npz
from chainer.training import triggers
from chainer.training.updaters import StandardUpdater
from rank_threads import ThreadCollectives, run_ranks

ITERATIONS = 12


class Loss(chainer.Chain):
    """Reports losses that are given, one an iteration, and goes on as they say."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses, self.calls = losses, 0
        with self.init_scope():
            self.W = chainer.Parameter(np.ones(3, "f"))

    def __call__(self, x: np.ndarray) -> chainer.Variable:
        self.calls += 1
        if self.losses:
            chainer.report({"loss": self.losses[self.calls - 1]}, self)
        return chainer.functions.sum(self.W * x)


def trainer_of(
    collectives: ThreadCollectives, losses: list[float], out: Path, stop: Any = None
) -> training.Trainer:
    optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
    optimizer.setup(Loss(losses))
    data = chainer.datasets.TupleDataset(np.ones((8, 3), "f"))
    updater = StandardUpdater(SerialIterator(data, 2), optimizer)
    return training.Trainer(updater, stop or (ITERATIONS, "iteration"), str(out))


class Fired(training.Extension):
    """Keeps the iterations in which it was called."""

    def __init__(self) -> None:
        self.iterations: list[int] = []

    def __call__(self, trainer: training.Trainer) -> None:
        self.iterations.append(trainer.updater.iteration)


class Clock:
    """A trigger that fires in iterations of its own on each rank."""

    def __init__(self, iterations: set[int]) -> None:
        self.iterations = iterations

    def __call__(self, trainer: training.Trainer) -> bool:
        return trainer.updater.iteration in self.iterations


MIN = [5.0, 4.0, 4.5, 3.0, 6.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 9.0]
MAX = list(reversed(MIN))


def fired(make: Callable[[int], Any], losses: list[list[float]], tmp_path: Path) -> list[list[int]]:
    def run(collectives: ThreadCollectives) -> list[int]:
        trainer = trainer_of(collectives, losses[collectives.rank], tmp_path)
        extension = Fired()
        trainer.extend(extension, trigger=as_rank_zero(make(collectives.rank)))
        trainer.run()
        return extension.iterations

    return run_ranks(len(losses), run)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda rank: Clock({2, 7}) if rank == 0 else Clock({3}), [2, 7]),
        (lambda rank: triggers.MinValueTrigger("main/loss", (1, "iteration")), [1, 2, 4, 6, 11]),
        (lambda rank: triggers.MinValueTrigger("main/loss", (2, "iteration")), [2, 4, 8]),
        (lambda rank: triggers.MinValueTrigger("main/loss", Clock({2, 4, 9})), [2, 4, 9]),
        (lambda rank: triggers.MaxValueTrigger("main/loss", (1, "epoch")), [4]),
    ],
)
@pytest.mark.parametrize("others", [MAX, []])
def test_a_trigger_fires_on_all_ranks_when_it_does_on_rank_0(
    make: Any, expected: list[int], others: list[float], tmp_path: Path
) -> None:
    assert fired(make, [MIN, others, others], tmp_path) == [expected] * 3


def exchanges(make: Callable[[], Any], tmp_path: Path) -> int:
    """How many more words two ranks exchange in a training with a trigger."""

    def run(collectives: ThreadCollectives, trigger: Any) -> int:
        calls = 0
        exchange = collectives.exchange_word

        def count(word: int) -> int:
            nonlocal calls
            calls += 1
            return exchange(word)

        collectives.exchange_word = count  # type: ignore[method-assign]
        trainer = trainer_of(collectives, MIN, tmp_path)
        trainer.extend(Fired(), trigger=as_rank_zero(trigger))
        trainer.run()
        return calls

    without = run_ranks(2, lambda collectives: run(collectives, lambda trainer: False))[0]
    return run_ranks(2, lambda collectives: run(collectives, make()))[0] - without + ITERATIONS


def test_usual_triggers_cost_nothing_and_others_only_when_they_may_fire(tmp_path: Path) -> None:
    alike: list[Callable[[], Any]] = [
        lambda: triggers.IntervalTrigger(1, "iteration"),
        lambda: triggers.IntervalTrigger(1, "epoch"),
        lambda: triggers.ManualScheduleTrigger([2, 3], "iteration"),
        lambda: triggers.OnceTrigger(),
    ]
    assert [exchanges(make, tmp_path) for make in alike] == [0] * 4
    by_epoch = exchanges(lambda: triggers.MinValueTrigger("main/loss"), tmp_path)
    assert by_epoch == ITERATIONS // 4
    assert exchanges(lambda: triggers.TimeTrigger(1e-9), tmp_path) == ITERATIONS


@pytest.mark.parametrize("kind", ["checkpoint", "snapshot"])
def test_checkpoints_and_snapshots_go_by_the_value_of_rank_0(kind: str, tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        trainer = trainer_of(collectives, [MIN, MAX][collectives.rank], tmp_path / "out")
        trigger = triggers.MinValueTrigger("main/loss", (1, "iteration"))
        if kind == "checkpoint":
            trainer.extend(smorms3_dist.ShardedCheckpoint(tmp_path / "ck", every=trigger))
        else:
            trainer.extend(smorms3_dist.extensions.snapshot(), trigger=trigger)
        trainer.run()

    run_ranks(2, run)
    names = [*(tmp_path / "ck").glob("step*"), *(tmp_path / "out").glob("snap*")]
    numbers = sorted(int(path.name.replace("_", "-").split("-")[-1]) for path in names)
    assert numbers == [1, 2, 4, 6, 11]


def ended(losses: list[list[float]], tmp_path: Path, **options: Any) -> list[int]:
    def run(collectives: ThreadCollectives) -> int:
        stop = early_stopping_trigger(monitor="main/loss", **options)
        trainer = trainer_of(collectives, losses[collectives.rank], tmp_path, stop)
        trainer.run()
        return trainer.updater.iteration

    return run_ranks(len(losses), run)


def test_a_training_ends_early_on_all_ranks_by_the_value_of_rank_0(tmp_path: Path) -> None:
    every = {"check_trigger": (1, "iteration")}
    # Two looks after iteration 6 bring nothing better.
    for others in (MAX, []):
        assert ended([MIN, others], tmp_path, patience=2, **every) == [8, 8]
    assert ended([MIN, MAX], tmp_path, patience=9, max_trigger=(7, "iteration"), **every) == [7, 7]
    by_clock = {"check_trigger": Clock({1, 3, 5})}
    assert ended([MIN, MAX], tmp_path, patience=1, **by_clock) == [5, 5]


def test_early_stopping_goes_on_with_the_patience_that_was_left(tmp_path: Path) -> None:
    every = {"check_trigger": (1, "iteration"), "patience": 3}
    losses = [1.0, 2.0, 3.0, 4.0, 5.0]

    def run(collectives: ThreadCollectives, until: int, load: bool) -> tuple[int, int]:
        stop = early_stopping_trigger(max_trigger=(until, "iteration"), **every)
        given = losses[2:] if load else losses
        trainer = trainer_of(collectives, given, tmp_path / "out", stop)
        checkpoint = smorms3_dist.ShardedCheckpoint(tmp_path / "ck", every=(2, "iteration"))
        trainer.extend(checkpoint)
        if load:
            checkpoint.maybe_load(trainer)
        trainer.run()
        return trainer.updater.iteration, stop.count

    assert run_ranks(2, lambda collectives: run(collectives, 2, False))[0][0] == 2
    assert run_ranks(2, lambda collectives: run(collectives, 10, True)) == [(4, 3), (4, 0)]


def test_a_file_without_early_stopping_loads(tmp_path: Path) -> None:
    trigger = early_stopping_trigger()
    save_npz(tmp_path / "x.npz", chainer.links.Linear(1, 1))
    load_npz(tmp_path / "x.npz", trigger)
    assert trigger.patience == 3
    assert trigger.get_training_length() == (100, "epoch")


def test_real_ranks_save_and_end_together(tmp_path: Path) -> None:
    reports = mpirun.run_program(2, "rank_zero.py", str(tmp_path))
    for facts in reports:
        assert facts["kinds"] == {"checkpoint": 30, "snapshot": 30, "plain": 30, "early": 10}
    for kind in ("checkpoint", "snapshot", "plain"):
        assert any(p.name.startswith(("step-", "snapshot")) for p in (tmp_path / kind).iterdir())
