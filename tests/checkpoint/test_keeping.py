"""The best step, steps by the clock, and what is done after a save."""

from __future__ import annotations

import itertools
import logging
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import smorms3_dist
from smorms3_dist import ShardedCheckpoint, load_checkpoint, save_checkpoint
from smorms3_dist.checkpoint import extension, saving
from smorms3_dist.checkpoint.files import CheckpointDirectory, manifest_json
from smorms3_dist.checkpoint.files.worth import BestStep

import chainer
import numpy as np
import pytest
from chainer import training
from rank_threads import ThreadCollectives, run_ranks
from resuming import make

LOSS = ("main/loss", "min")
NAN = float("nan")


class Reports(chainer.Chain):
    """Reports the values that are given, one an iteration, each but ``None``."""

    def __init__(self, values: Sequence[Any], done: Callable[[], Any]) -> None:
        super().__init__()
        self.values, self.calls, self.done = values, 0, done
        with self.init_scope():
            self.W = chainer.Parameter(np.ones(3, "f"))

    def __call__(self, x: np.ndarray) -> chainer.Variable:
        value = self.values[self.calls]
        self.calls += 1
        self.done()
        if value is not None:
            chainer.report({"loss": value}, self)
        return chainer.functions.sum(self.W * x)


def train(
    directory: Path,
    values: Sequence[Sequence[Any]],
    done: Callable[[int], Any] = lambda rank: None,
    **options: Any,
) -> list[int]:
    """Trains with a save in each iteration, for as many as there are values; gives the steps.

    Goes on from the newest step. ``done`` is called on each rank in each iteration.
    """

    def run(collectives: ThreadCollectives) -> None:
        mine, rank = values[collectives.rank], collectives.rank
        actual = chainer.optimizers.SMORMS3()
        optimizer = smorms3_dist.create_multi_node_optimizer(actual, collectives)
        optimizer.setup(Reports(mine, lambda: done(rank)))
        data = chainer.datasets.TupleDataset(np.ones((8, 3), "f"))
        updater = training.updaters.StandardUpdater(
            chainer.iterators.SerialIterator(data, 2), optimizer
        )
        trainer = training.Trainer(updater, (0, "iteration"), str(directory.parent))
        checkpoint = ShardedCheckpoint(directory, **{"every": (1, "iteration"), **options})
        trainer.extend(checkpoint)
        begun = checkpoint.maybe_load(trainer) or 0
        trainer.stop_trigger = training.triggers.IntervalTrigger(begun + len(mine), "iteration")
        trainer.run()

    run_ranks(len(values), run)
    return CheckpointDirectory(directory).steps()


def test_the_best_step_by_rank_0_s_value_is_kept_also_by_trainings_that_go_on(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "checkpoints"
    options: dict[str, Any] = {"keep_last": 2, "keep_best": LOSS}
    others = [9, 8, 7, 6, 5]
    mine = [5.0, np.float32(2), chainer.Variable(np.array(2.0, "f")), 3.0, 4.0]
    assert train(directory, [mine, others, others], **options) == [2, 4, 5]
    # Of another number of ranks, with a best step of whose value it knows by the directory alone.
    assert train(directory, [[6.0, 2.5, 7.0]], **options) == [2, 7, 8]
    # What is the best by another value is found among the steps that have that.
    assert train(directory, [[8.0]], keep_last=1, keep_best=("main/loss", "max")) == [9]
    assert train(directory, [[1.0, 3.0, 3.0]], **options) == [10, 11, 12]


def test_steps_without_a_finite_value_are_not_compared_which_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = [NAN, None, 3.0, NAN, None, np.ones(2), float("-inf"), 4.0]
    kept = train(tmp_path / "c", [values, values], keep_last=1, keep_best=LOSS)
    assert kept == [3, 8]
    said = [r.getMessage() for r in caplog.records if "cannot be the best" in r.getMessage()]
    assert [text.partition(". A step that")[0] for text in said] == [
        "step 1 cannot be the best: main/loss is nan",
        "step 2 cannot be the best: main/loss is not reported in its iteration",
        "step 6 cannot be the best: main/loss is no number, but array([1., 1.])",
        "step 7 cannot be the best: main/loss is -inf",
    ]


def test_the_best_step_of_a_loop_and_of_one_that_has_gone_back(tmp_path: Path) -> None:
    def steps(values: dict[int, float], load: int | None, keep_last: int) -> list[int]:
        def run(collectives: ThreadCollectives) -> None:
            optimizer = make(collectives)
            if load is not None:
                load_checkpoint(tmp_path, optimizer, step=load)
            for step, value in values.items():
                save_checkpoint(
                    tmp_path,
                    optimizer,
                    step=step,
                    keep_last=keep_last,
                    keep_best=("loss", "min"),
                    values={"loss": value if collectives.rank == 0 else 0.0},
                )

        run_ranks(2, run)
        return CheckpointDirectory(tmp_path).steps()

    assert steps({1: 3, 2: 5, 3: 1}, None, 3) == [1, 2, 3]
    # Those from which it has gone back do not count, from the first save on.
    assert steps({4: 6}, 2, 1) == [1, 4]
    assert steps({5: 7, 6: 2, 7: 8, 8: 9}, 4, 1) == [6, 8]
    # Saved again, a step is worth what it is now.
    assert steps({8: 9, 9: 5, 10: 9}, 6, 1) == [6, 10]
    assert steps({6: 8, 11: 9, 12: 9}, 6, 1) == [6, 12]
    assert steps({6: 9, 13: 8, 14: 9}, 6, 1) == [13, 14]


def test_a_damaged_step_is_not_the_best(tmp_path: Path) -> None:
    steps = CheckpointDirectory(tmp_path / "c")
    train(steps.path, [[3.0, 1.0, 2.0, 5.0]], keep_last=9, keep_best=LOSS)
    best = BestStep(steps)
    assert best.find(*LOSS) == 2
    (steps.path_of(2) / "shard-00000.safetensors").write_bytes(b"short")
    assert best.find(*LOSS) == 3
    (steps.path_of(3) / manifest_json.NAME).write_text("{}")
    assert best.find(*LOSS) == 1
    assert best.find("main/loss", "max") is None
    assert best.find("accuracy", "max") is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_best": "loss", "keep_last": 1}, "keep_best is the name of a value and 'max' or"),
        ({"keep_best": ("loss", "most"), "keep_last": 1}, "not \\('loss', 'most'\\)"),
        ({"keep_best": LOSS}, "keep_best says what to keep besides keep_last"),
        ({"keep_every": 3}, "keep_every says what to keep besides keep_last"),
        ({"keep_last": 0}, "keep_last must be positive or None, not 0"),
        ({"every_minutes": 0}, "every_minutes must be a positive number or None, not 0"),
        ({"every_minutes": NAN}, "every_minutes must be a positive number or None, not nan"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ShardedCheckpoint(tmp_path, **options)


@pytest.mark.parametrize(
    ("every", "steps"),
    [(None, [3, 6]), ((1, "epoch"), [3, 4, 7, 8]), ((4, "iteration"), [3, 4, 7, 8])],
)
def test_steps_by_the_clock_of_rank_0_are_saved_on_all_ranks(
    tmp_path: Path, every: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = threading.local()

    def tick(rank: int) -> None:
        # Before the update that tells the others: after 25, 50 and 75 seconds.
        now.seconds = getattr(now, "seconds", 0) + (25, 70, 1000)[rank]

    clock = types.SimpleNamespace(monotonic=lambda: getattr(now, "seconds", 0))
    monkeypatch.setattr(extension, "time", clock)
    none = [[None] * 8] * 3
    options = {"every": every, "every_minutes": 1, "keep_best": LOSS, "keep_last": 9}
    assert train(tmp_path / "c", none, tick, **options) == steps


def test_a_clock_on_some_ranks_alone_is_an_error_on_all_and_no_hang(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        minutes = 1e-9 if collectives.rank == 0 else None
        checkpoint = ShardedCheckpoint(tmp_path, every=None, every_minutes=minutes)
        updater = training.updaters.StandardUpdater(
            chainer.iterators.SerialIterator([1, 2], 1), optimizer
        )
        trainer = training.Trainer(updater, (2, "iteration"), str(tmp_path))
        trainer.extend(checkpoint)
        checkpoint.initialize(trainer)
        with pytest.raises(RuntimeError, match=r"rank 0 has in the background: .*_Clock"):
            optimizer.update()
        checkpoint.on_error(trainer, RuntimeError(), None)
        checkpoint.finalize()

    run_ranks(2, run)


def test_nobody_expects_a_value_where_the_clock_saves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"every": None, "every_minutes": 1e-9, "keep_last": 1, "keep_best": LOSS}
    assert train(tmp_path / "c", [[None, 1.0, None, 2.0, None]] * 2, **options) == [2, 5]
    assert "cannot be the best" not in caplog.text


def test_after_save_sees_each_step_whole_before_another_can_remove_it(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path / "c")
    called: list[tuple[int, str]] = []
    begun, saves = threading.Event(), itertools.count(1)

    def after_save(step: int, path: Path) -> None:
        begun.set()
        assert threading.current_thread().name == "checkpoint"
        # The training goes on meanwhile, as far as to its next save.
        assert directory.check(step).step == step
        assert directory.steps() == [step]
        called.append((step, path.name))

    def done(rank: int) -> None:
        if rank == 0 and next(saves) == 3:
            assert begun.wait(60)

    options: dict[str, Any] = {"keep_last": 1, "after_save": after_save}
    assert train(directory.path, [[1, 1, 1]] * 2, done, **options) == [3]
    assert called == [(step, f"step-{step:010}") for step in (1, 2, 3)]


def test_what_after_save_raises_is_logged_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def upload(step: int, path: Path) -> None:
        if step == 2:
            raise OSError("no route to host")

    caplog.set_level(logging.ERROR)
    assert train(tmp_path / "c", [[1, 1, 1]] * 2, after_save=upload) == [1, 2, 3]
    (record,) = caplog.records
    assert "upload has failed for step 2, which is whole in" in record.getMessage()
    assert "OSError('no route to host')" in record.getMessage()


def test_after_save_of_a_loop_is_over_when_a_save_that_waits_is(tmp_path: Path) -> None:
    called: list[int] = []

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        for step in (1, 2):
            save_checkpoint(
                tmp_path, optimizer, step=step, after_save=lambda step, path: called.append(step)
            )
            assert collectives.rank or called[-1] == step
        saving.Saver(tmp_path, {"main": optimizer}).close()

    run_ranks(2, run)
    assert called == [1, 2]
