"""A resumed Trainer is the uninterrupted one, also in what Chainer does not save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smorms3_dist

import chainer
import models
import numpy as np
import pytest
from chainer.iterators import SerialIterator, ShuffleOrderSampler
from chainer.training import Extension, Trainer, extensions, triggers
from chainer.training.updaters import StandardUpdater
from rank_threads import ThreadCollectives, run_ranks

LAST, BREAK = 11, 5


class Net(chainer.Chain):
    """Reports a loss."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l = chainer.links.Linear(3, 2, initialW=0.5)

    def __call__(self, x: np.ndarray) -> chainer.Variable:
        loss = chainer.functions.sum(self.l(x) ** 2)
        chainer.report({"loss": loss}, self)
        return loss


Extend = Callable[[Trainer], object]


def run(
    collectives: ThreadCollectives,
    directory: Path,
    extend: Extend,
    until: int,
    stop: Any = None,
    seed: int = 0,
) -> tuple[Trainer, list[dict[str, Any]]]:
    net = Net()
    optimizer = smorms3_dist.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(), collectives, step_after_broadcast=True
    ).setup(net)
    data = np.random.RandomState(collectives.rank).standard_normal((20, 3)).astype("f")
    sampler = ShuffleOrderSampler(np.random.RandomState(collectives.rank + seed))
    iterator = SerialIterator([(x,) for x in data], 4, order_sampler=sampler)
    trainer = Trainer(
        StandardUpdater(iterator, optimizer),
        triggers.IntervalTrigger(until, "iteration") if stop is None else stop,
        str(directory / "out"),
    )
    log = extensions.LogReport(trigger=(1, "iteration"), filename=None)
    trainer.extend(log)
    trainer.extend(extensions.observe_lr(), trigger=(1, "iteration"))
    extend(trainer)
    checkpoint = smorms3_dist.ShardedCheckpoint(directory / "ck", every=(BREAK, "iteration"))
    trainer.extend(checkpoint)
    checkpoint.maybe_load(trainer)
    trainer.run()
    time = ("elapsed_time", "checkpoint/stalled_s", "checkpoint/waited_s")
    return trainer, [{k: v for k, v in each.items() if k not in time} for each in log.log]


def statistics(trainer: Trainer) -> None:
    model = trainer.updater.get_optimizer("main").target
    trainer.extend(
        extensions.ParameterStatistics(model, {"mean": np.mean}, report_grads=False,
                                       trigger=(3, "iteration"))
    )  # fmt: skip


CASES: dict[str, Extend] = {
    "multistep": lambda t: t.extend(extensions.MultistepShift("lr", 0.5, [2, 4, 8], 0.1)),
    "warmup": lambda t: t.extend(extensions.WarmupShift("lr", 0.01, 9, 0.1)),
    "linear": lambda t: t.extend(extensions.LinearShift("lr", (0.01, 0.1), (2, 9))),
    "exponential": lambda t: t.extend(extensions.ExponentialShift("lr", 0.9), trigger=(2, "epoch")),
    "statistics": statistics,
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_is_the_uninterrupted_one(case: str, tmp_path: Path) -> None:
    """Also where iterators have random numbers of their own."""

    def both(collectives: ThreadCollectives) -> None:
        whole, expected = run(collectives, tmp_path / "whole", CASES[case], LAST)
        run(collectives, tmp_path / "parts", CASES[case], BREAK)
        resumed, log = run(collectives, tmp_path / "parts", CASES[case], LAST, seed=77)
        assert log == expected
        iterators = [t.updater.get_iterator("main") for t in (whole, resumed)]
        assert iterators[0]._state.order.tolist() == iterators[1]._state.order.tolist()
        models.assert_same_bits(*(t.updater.get_optimizer("main").target for t in (whole, resumed)))

    run_ranks(2, both)


def test_a_plot_has_no_spike_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plots: list[Any] = []

    def extend(trainer: Trainer) -> None:
        plots.append(extensions.PlotReport(["main/loss"], trigger=(3, "iteration")))
        trainer.extend(plots[-1])

    pytest.importorskip("matplotlib").use("Agg")

    def both(collectives: ThreadCollectives) -> None:
        for directory, until in (("whole", LAST), ("parts", BREAK), ("parts", LAST)):
            run(collectives, tmp_path / directory, extend, until)

    run_ranks(1, both)
    # Pairs come back from JSON as lists.
    whole, _, resumed = (json.dumps(plot._data) for plot in plots)
    assert whole == resumed


def test_chainers_early_stopping_has_the_patience_that_was_left(tmp_path: Path) -> None:
    def run_until(collectives: ThreadCollectives, limit: int) -> Any:
        stop = triggers.EarlyStoppingTrigger(
            (1, "iteration"), "lr", patience=8, mode="max", max_trigger=(limit, "iteration")
        )
        run(collectives, tmp_path, CASES["nothing"], 0, stop)
        return stop

    with pytest.warns(UserWarning, match="lr is not in observation"):
        stop = run_ranks(1, lambda c: run_until(c, BREAK))[0]
        assert stop.count < 8
        resumed = run_ranks(1, lambda c: run_until(c, 99))[0]
    assert (resumed.best, resumed.count) == (stop.best, 8)


class Counter(Extension):
    """Has a state."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, trainer: Trainer) -> None:
        self.count += 1

    def serialize(self, serializer: Any) -> None:
        self.count = serializer("count", self.count)


def test_an_extension_that_is_added_after_loading_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(2, lambda c: run(c, tmp_path, lambda t: t.extend(Counter()), BREAK))

    def late(collectives: ThreadCollectives) -> None:
        net = Net()
        optimizer = smorms3_dist.create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives
        ).setup(net)
        iterator = SerialIterator([(np.ones(3, "f"),)] * 20, 4)
        trainer = Trainer(StandardUpdater(iterator, optimizer), (7, "iteration"), str(tmp_path))
        checkpoint = smorms3_dist.ShardedCheckpoint(tmp_path / "ck")
        trainer.extend(checkpoint, name="ShardedCheckpoint")
        checkpoint.maybe_load(trainer)
        trainer.extend(Counter())
        trainer.extend(Extension(), name="stateless", trigger=lambda trainer: False)
        trainer.run()

    run_ranks(2, late)
    assert caplog.messages == [
        "the trainer was extended with Counter after maybe_load(): their state in the checkpoint "
        "was not loaded. Extend it before"
    ]
