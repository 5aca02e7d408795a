"""Steps of another training, steps left behind, and what happens to the directory in between."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import smorms3_dist
from smorms3_dist import (
    CheckpointError,
    DamagedCheckpointError,
    NoCheckpointError,
    latest_step,
    load_checkpoint,
    save_checkpoint,
)
from smorms3_dist.checkpoint import saving
from smorms3_dist.checkpoint.files import CheckpointDirectory
from smorms3_dist.checkpoint.files.steps import Steps

import chainer
import disks
import models
import numpy as np
import pytest
from chainer.iterators import SerialIterator
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from rank_threads import ThreadCollectives, run_ranks
from resuming import make, train


def saved(directory: Path, steps: range, load: int | None = None, **options: Any) -> list[Any]:
    """Saves steps on two ranks, after loading one, and returns the optimizers."""

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives)
        if load is None:
            optimizer.update()
        else:
            load_checkpoint(directory, optimizer, step=load or None)
        for step in steps:
            train(optimizer, range(step, step + 1), collectives.rank)
            save_checkpoint(directory, optimizer, step=step, **options)
        return optimizer

    return run_ranks(2, run)


NEWEST = 0
"""For ``load``."""


def abandoned(directory: Path) -> list[str]:
    names = [path.name for path in directory.iterdir() if path.name.startswith("abandoned-")]
    return sorted(name.rpartition("-")[0] for name in names)


@pytest.mark.parametrize(("first", "listed"), [(2, "steps 2, 3"), (3, "step 3"), (1, "1, 2, 3")])
def test_a_training_that_has_not_loaded_replaces_nothing_and_saves_nothing_older(
    first: int, listed: str, tmp_path: Path
) -> None:
    saved(tmp_path, range(1, 4))
    with pytest.raises(CheckpointError, match=f"{listed}, which .*maybe_load.*overwrite=True"):
        saved(tmp_path, range(first, first + 1))
    assert CheckpointDirectory(tmp_path).steps() == [1, 2, 3]
    # Beyond them there is nothing to lose.
    saved(tmp_path, range(4, 5))
    assert CheckpointDirectory(tmp_path).steps() == [1, 2, 3, 4]


def test_overwrite_sets_another_training_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, range(1, 4))
    saved(tmp_path, range(2, 4), overwrite=True)
    assert CheckpointDirectory(tmp_path).steps() == [2, 3]
    assert abandoned(tmp_path) == [f"abandoned-step-{n:010d}" for n in (1, 2, 3)]
    (said,) = caplog.messages
    assert "steps 1, 2, 3, which this training does not go on from, will be set aside" in said
    saved(tmp_path, range(4, 5), load=NEWEST, keep_last=1)
    assert CheckpointDirectory(tmp_path).steps() == [4]
    assert abandoned(tmp_path) == []


@pytest.mark.parametrize("keep_last", [None, 3])
def test_what_was_left_behind_is_never_the_newest_again(
    keep_last: int | None, tmp_path: Path
) -> None:
    saved(tmp_path, range(1, 8))
    optimizer = saved(tmp_path, range(4, 6), load=3, keep_last=keep_last)[0]
    steps = CheckpointDirectory(tmp_path)
    assert steps.steps()[-2:] == [4, 5]
    assert [steps.manifest(step).notes["parent"] for step in (4, 5)] == [3, 4]
    # What is kept is counted without them.
    assert steps.steps() == ([1, 2, 3, 4, 5] if keep_last is None else [3, 4, 5])
    assert len(abandoned(tmp_path)) == (4 if keep_last is None else 0)
    after = saved(tmp_path, range(0), load=NEWEST)[0]
    models.assert_same_bits(after.target, optimizer.target)


def test_what_was_left_behind_stays_until_there_is_a_new_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, range(1, 5))
    write = saving.write_shard

    def fail(*arguments: Any) -> Any:
        raise OSError("the disk is full")

    monkeypatch.setattr(saving, "write_shard", fail)
    with pytest.raises(BaseException, match="disk is full"):
        saved(tmp_path, range(3, 4), load=2)
    monkeypatch.setattr(saving, "write_shard", write)
    assert CheckpointDirectory(tmp_path).steps() == [1, 2, 3, 4]


def test_a_training_may_go_back_to_its_own_steps_and_save_them_again(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        for step in (1, 2, 2, 3, 1):
            save_checkpoint(tmp_path, optimizer, step=step)
        load_checkpoint(tmp_path, optimizer, step=2)
        save_checkpoint(tmp_path, optimizer, step=9)

    run_ranks(2, run)
    assert CheckpointDirectory(tmp_path).steps() == [1, 2, 9]


def test_a_damaged_newest_step_may_be_replaced(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 4))
    (Steps(tmp_path).path_of(3) / "shard-00000.safetensors").unlink()
    saved(tmp_path, range(3, 4), load=NEWEST)
    assert CheckpointDirectory(tmp_path).steps() == [1, 2, 3]


def test_a_save_that_has_failed_after_its_step_was_there_can_be_repeated(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        save_checkpoint(tmp_path, optimizer, step=1)
        with disks.failing("fsync", str(tmp_path)):
            with pytest.raises(CheckpointError, match="cannot be synced: Input/output error"):
                save_checkpoint(tmp_path, optimizer, step=2)
            assert latest_step(tmp_path) == 2
        save_checkpoint(tmp_path, optimizer, step=2)

    run_ranks(1, run)
    assert Steps(tmp_path).steps() == [1, 2]


def test_one_process_may_open_its_own_directory_again(tmp_path: Path) -> None:
    first = saved(tmp_path, range(1, 3))
    saved(tmp_path, range(3, 5), load=NEWEST)

    # The first training has not ended, but is no longer the newest.
    def go_on(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        with pytest.raises(CheckpointError, match="step 4, which this training"):
            optimizer.update()
            save_checkpoint(tmp_path, optimizer, step=4)

    run_ranks(2, go_on)
    assert len(first) == 2


@pytest.mark.parametrize("how", ["removed", "replaced", "emptied"])
def test_a_directory_that_is_replaced_in_mid_training_is_noticed(how: str, tmp_path: Path) -> None:
    directory = tmp_path / "ck"

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        save_checkpoint(directory, optimizer, step=1)
        if collectives.rank == 0:
            shutil.move(directory, tmp_path / "old")
            if how == "replaced":
                shutil.copytree(tmp_path / "old", directory)
            elif how == "emptied":
                directory.mkdir()
        collectives.all_gather_object(None)
        with pytest.raises(CheckpointError, match=r"was removed or replaced .*Start the job again"):
            save_checkpoint(directory, optimizer, step=2)

    run_ranks(2, run)
    assert CheckpointDirectory(directory).steps() == ([1] if how == "replaced" else [])


def test_ranks_that_overwrite_and_others_that_do_not_are_told(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        with pytest.raises(RuntimeError, match=r"the save \(overwrite=True\) of step 0"):
            save_checkpoint(tmp_path, optimizer, overwrite=collectives.rank == 0)

    run_ranks(2, run)


def test_loading_waits_for_a_save_in_the_background(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        for step in (1, 2):
            save_checkpoint(tmp_path, optimizer, step=step, asynchronous=True)
        assert load_checkpoint(os.path.relpath(tmp_path), optimizer).step == 2

    run_ranks(2, run)


def test_no_step_and_no_whole_step_are_different_errors(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        empty, damaged = tmp_path / "empty", tmp_path / "damaged"
        assert load_checkpoint(empty, optimizer, missing_ok=True) is None
        with pytest.raises(NoCheckpointError, match=r"has no checkpoint.*missing_ok=True"):
            load_checkpoint(empty, optimizer)
        with pytest.raises(NoCheckpointError, match=r"has no step 7; it has 1, 2"):
            load_checkpoint(damaged, optimizer, step=7)
        for options in ({}, {"step": 1}):
            with pytest.raises(DamagedCheckpointError):
                load_checkpoint(damaged, optimizer, missing_ok=True, **options)

    saved(tmp_path / "damaged", range(1, 3))
    assert latest_step(tmp_path / "damaged") == 2
    for path in (tmp_path / "damaged").glob("step-*/shard-00001.safetensors"):
        path.unlink()
    run_ranks(2, run)
    assert latest_step(tmp_path / "damaged") is None
    assert latest_step(tmp_path / "empty") is None


def test_a_manifest_is_short_in_words(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 2))
    text = repr(CheckpointDirectory(tmp_path).manifest(1))
    assert text.startswith("<Manifest of step 1: t=1, epoch=0, 2 ranks, ")
    assert len(text) < 80


def trainer_of(collectives: ThreadCollectives, out: Path, until: int) -> Trainer:
    link = chainer.links.Linear(3, 2, initialW=0.5)
    optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
    optimizer.setup(link)
    data = chainer.datasets.TupleDataset(np.ones((8, 3), "f"))
    updater = StandardUpdater(
        SerialIterator(data, 2), optimizer, loss_func=lambda x: chainer.functions.sum(link(x))
    )
    return Trainer(updater, (until, "iteration"), str(out))


def test_a_trainer_that_does_not_load_is_refused_before_the_first_iteration(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(collectives: ThreadCollectives, until: int, load: bool, **options: Any) -> int:
        trainer = trainer_of(collectives, tmp_path / "out", until)
        checkpoint = smorms3_dist.ShardedCheckpoint(
            tmp_path / "ck", every=(2, "iteration"), **options
        )
        trainer.extend(checkpoint)
        if load:
            checkpoint.maybe_load(trainer)
        try:
            trainer.run()
        except CheckpointError as error:
            assert "steps 2, 4, which this training has neither saved nor loaded" in str(error)
        return int(trainer.updater.iteration)

    assert run_ranks(2, lambda c: run(c, 4, True)) == [4, 4]
    assert (
        capfd.readouterr().err
        == f"smorms3_dist: {tmp_path / 'ck'} has no checkpoint: starting afresh\n"
    )
    assert run_ranks(2, lambda c: run(c, 4, False)) == [0, 0]
    assert run_ranks(2, lambda c: run(c, 6, True)) == [6, 6]
    assert capfd.readouterr().err == f"smorms3_dist: going on from step 4 of {tmp_path / 'ck'}\n"
    assert run_ranks(2, lambda c: run(c, 2, False, overwrite=True)) == [2, 2]
    assert CheckpointDirectory(tmp_path / "ck").steps() == [2]


def test_before_setup_the_error_says_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 2))

    def run(collectives: ThreadCollectives) -> None:
        optimizer = smorms3_dist.create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives
        )
        with pytest.raises(RuntimeError, match=r"call setup\(link\) before loading"):
            load_checkpoint(tmp_path, optimizer)
        with pytest.raises(RuntimeError, match=r"call setup\(link\)"):
            save_checkpoint(tmp_path / "other", optimizer)

    run_ranks(2, run)
