"""Chainer's HDF5 serializers with a sharded optimizer: all that npz does."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import smorms3_dist

import chainer
import models
import numpy as np
import pytest
from chainer import serializers, training
from chainer.iterators import SerialIterator
from chainer.optimizers import MSVAG, SMORMS3
from chainer.training import extensions
from chainer.training.updaters import StandardUpdater
from rank_threads import ThreadCollectives, run_ranks
from test_serialization import (
    FIRST,
    LAST,
    assert_same_states,
    begun,
    dynamic,
    facts,
    half_model,
    make,
    masters,
    model,
    nothing,
    train,
    train_chainer,
)

h5py = pytest.importorskip("h5py")


def save(path: pathlib.Path, target: Any) -> None:
    serializers.save_hdf5(str(path), target)


def load(path: pathlib.Path, target: Any, strict: bool = True) -> None:
    with h5py.File(path, "r") as file:
        serializers.HDF5Deserializer(file, strict=strict).load(target)


strictly = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])


@strictly
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_snapshots_of_chainer_load_before_and_after_a_step(
    tmp_path: pathlib.Path, world_size: int, strict: bool
) -> None:
    theirs = model()
    plain = models.train_with_chainer(theirs, world_size, FIRST)
    save(tmp_path / "optimizer", plain)
    save(tmp_path / "model", theirs)
    train_chainer(plain, LAST, world_size)

    def run(collectives: ThreadCollectives, after_a_step: bool) -> Any:
        optimizer = make(collectives, seed=9)
        if after_a_step:
            optimizer.update()
            train(optimizer, range(20, 22), collectives.rank)
        load(tmp_path / "optimizer", optimizer, strict)
        load(tmp_path / "model", optimizer.target, strict)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    for after_a_step in (False, True):
        for optimizer in run_ranks(world_size, functools.partial(run, after_a_step=after_a_step)):
            assert optimizer.t == plain.t
            models.assert_same_bits(optimizer.target, theirs)


@strictly
@pytest.mark.parametrize(
    ("configure", "make_model", "kind"),
    [
        (nothing, model, SMORMS3),
        (masters, half_model, SMORMS3),
        (dynamic, half_model, SMORMS3),
        (nothing, model, MSVAG),
    ],
    ids=["plain", "masters", "dynamic", "msvag"],
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_shards_resume_as_if_never_interrupted(
    tmp_path: pathlib.Path,
    world_size: int,
    configure: Callable[[Any], None],
    make_model: Callable[[], chainer.Link],
    kind: Any,
    strict: bool,
) -> None:
    def uninterrupted(collectives: ThreadCollectives) -> Any:
        optimizer = begun(collectives, configure, make_model, kind)
        optimizer.new_epoch()
        save(tmp_path / f"{collectives.rank}.optimizer", optimizer)
        save(tmp_path / f"{collectives.rank}.model", optimizer.target)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    def resumed(collectives: ThreadCollectives, after_a_step: bool) -> Any:
        optimizer = make(collectives, configure, make_model, kind, seed=9)
        if after_a_step:
            optimizer.update()
            train(optimizer, range(20, 22), collectives.rank)
        load(tmp_path / f"{collectives.rank}.optimizer", optimizer, strict)
        load(tmp_path / f"{collectives.rank}.model", optimizer.target, strict)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    expected = run_ranks(world_size, uninterrupted)
    for after_a_step in (False, True):
        ours = run_ranks(world_size, functools.partial(resumed, after_a_step=after_a_step))
        for one, other in zip(ours, expected, strict=True):
            assert facts(one) == facts(other)
            models.assert_same_bits(one.target, other.target)
        assert_same_states(models.gathered_states(ours), models.gathered_states(expected))


@pytest.mark.parametrize("consolidated", [True, False], ids=["consolidated", "single rank"])
@pytest.mark.parametrize(
    # Chainer does not load what has no states, strictly.
    ("made_a_step", "strict"),
    [(True, True), (True, False), (False, False)],
    ids=["after a step, strict", "after a step, not strict", "before a step, not strict"],
)
@pytest.mark.parametrize("configure", [nothing, masters])
def test_whole_states_load_in_chainer_and_in_their_writer(
    tmp_path: pathlib.Path,
    configure: Callable[[Any], None],
    made_a_step: bool,
    consolidated: bool,
    strict: bool,
) -> None:
    world_size = 2 if consolidated else 1
    make_model = half_model if configure is masters else model

    def write(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, make_model)
        if made_a_step or consolidated:
            optimizer.update()  # which broadcasts parameters
        if made_a_step:
            train(optimizer, FIRST, collectives.rank)
        if consolidated:
            optimizer.consolidate()
        if collectives.rank == 0:
            save(tmp_path / "optimizer", optimizer)
            save(tmp_path / "model", optimizer.target)
        optimizer.release_consolidated()
        if not (made_a_step or consolidated):
            optimizer.update()
        train(optimizer, LAST, collectives.rank)
        return optimizer

    def go_on(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, configure, make_model, seed=9)
        load(tmp_path / "optimizer", optimizer, strict)
        load(tmp_path / "model", optimizer.target, strict)
        train(optimizer, LAST, collectives.rank)
        return optimizer

    expected = run_ranks(world_size, write)
    for one, other in zip(run_ranks(world_size, go_on), expected, strict=True):
        assert facts(one) == facts(other)
        models.assert_same_bits(one.target, other.target)
    theirs = SMORMS3().setup(make_model())
    configure(theirs)
    load(tmp_path / "optimizer", theirs, strict)
    load(tmp_path / "model", theirs.target, strict)
    assert theirs.t == (len(FIRST) if made_a_step else 0)
    if configure is nothing:
        train_chainer(theirs, LAST, world_size)
        models.assert_same_bits(expected[0].target, theirs.target)


def test_a_file_that_lacks_a_parameter_is_refused_by_its_name_and_changes_nothing(
    tmp_path: pathlib.Path,
) -> None:
    save(tmp_path / "optimizer", models.train_with_chainer(model(), 1, FIRST))
    with h5py.File(tmp_path / "optimizer", "a") as file:
        del file["g"]

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        before = facts(optimizer)
        with pytest.raises(KeyError, match="nothing of parameter /g"):
            load(tmp_path / "optimizer", optimizer)
        assert facts(optimizer) == before
        load(tmp_path / "optimizer", optimizer, strict=False)
        assert optimizer.t == len(FIRST)
        assert optimizer.target.g.update_rule.t == 0
        assert optimizer.target.a.update_rule.t == len(FIRST)

    run_ranks(2, run)


def test_a_trainer_goes_on_from_its_snapshot_at_another_world_size(tmp_path: pathlib.Path) -> None:
    def trainer_for(optimizer: Any, until: int) -> training.Trainer:
        data = chainer.datasets.TupleDataset(np.ones((8, 3), "f"), np.zeros(8, "i"))
        updater = StandardUpdater(SerialIterator(data, 2, shuffle=False), optimizer)
        trainer = training.Trainer(updater, (until, "iteration"), str(tmp_path))
        # Strings, and values of None.
        trainer.extend(extensions.LogReport(trigger=(2, "iteration")))
        return trainer

    def link() -> chainer.Link:
        return chainer.links.Classifier(chainer.links.Linear(3, 2, initialW=0.5))

    def run(collectives: ThreadCollectives, until: int, resume: bool) -> Any:
        trainer = trainer_for(make(collectives, make_model=link), until)
        trainer.extend(
            smorms3_dist.extensions.snapshot(savefun=serializers.save_hdf5),
            trigger=(5, "iteration"),
        )
        if resume:
            serializers.load_hdf5(str(tmp_path / "snapshot_iter_5"), trainer)
        trainer.run()
        return trainer

    whole = run_ranks(2, functools.partial(run, until=9, resume=False))[0]
    log = [entry["iteration"] for entry in whole.get_extension("LogReport").log]
    for world_size in (1, 2):
        resumed = run_ranks(world_size, functools.partial(run, until=9, resume=True))[0]
        assert resumed.updater.get_optimizer("main").t == 8
        assert [e["iteration"] for e in resumed.get_extension("LogReport").log] == log
        models.assert_same_bits(*(t.updater.get_optimizer("main").target for t in (whole, resumed)))
    plain = trainer_for(SMORMS3().setup(link()), 9)
    serializers.load_hdf5(str(tmp_path / "snapshot_iter_5"), plain)
    plain.run()
    models.assert_same_bits(*(t.updater.get_optimizer("main").target for t in (whole, plain)))


def test_a_file_without_early_stopping_loads(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "link", chainer.links.Linear(1, 1))
    trigger = smorms3_dist.extensions.early_stopping_trigger()
    with h5py.File(tmp_path / "link", "r") as file:
        trigger.serialize(serializers.HDF5Deserializer(file)["stop_trigger"])
    assert trigger.patience == 3
