"""Saving by ranks that are threads: in the background, one at a time, and failing together."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

from smorms3_dist import CheckpointError, load_checkpoint, save_checkpoint
from smorms3_dist.checkpoint import saving
from smorms3_dist.checkpoint.files import CheckpointDirectory

import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks
from resuming import FIRST, LAST, half_model, load, make, masters, save, train


def test_saving_before_the_first_update_changes_nothing(tmp_path: Path) -> None:
    def run(how: str, collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, seed=9 if how == "resumed" else None)
        if how == "resumed":
            load_checkpoint(tmp_path, optimizer)
        else:
            if how == "saved":
                save_checkpoint(tmp_path, optimizer, step=0)
            models.set_gradients(optimizer.target, collectives.rank, 1)
            optimizer.update()
            assert optimizer.t == 0
        train(optimizer, FIRST, collectives.rank)
        return optimizer

    theirs = run_ranks(2, functools.partial(run, "not saved"))[0].target
    for how in ("saved", "resumed"):
        for optimizer in run_ranks(2, functools.partial(run, how)):
            assert optimizer.t == 3
            models.assert_same_bits(optimizer.target, theirs)


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, the writing of shards waits."""
    go, write = threading.Event(), saving.write_shard

    def slow(*arguments: Any) -> Any:
        assert go.wait(30)
        return write(*arguments)

    monkeypatch.setattr(saving, "write_shard", slow)
    return go


def test_training_goes_on_while_a_step_is_written(tmp_path: Path, go: threading.Event) -> None:
    directory = CheckpointDirectory(tmp_path)

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives)
        optimizer.update()
        train(optimizer, FIRST)
        before = models.arrays(optimizer.target)["/g"].copy()
        saver = save_checkpoint(tmp_path, optimizer, asynchronous=True)
        train(optimizer, LAST)
        assert saver.saving == 3
        assert directory.steps() == []
        collectives.all_gather_object(None)
        go.set()
        # As many steps as it takes: each one looks.
        while saver.saving is not None:
            train(optimizer, range(1, 2))
        assert directory.steps() == [3]
        return before

    before = run_ranks(2, run)[0]
    for optimizer in load(tmp_path, 3):
        assert models.arrays(optimizer.target)["/g"].tobytes() == before.tobytes()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_only_a_save_in_the_background_copies(
    tmp_path: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_shard
    written: dict[int, list[np.ndarray]] = {}

    def note(directory: Path, rank: int, host: str, of: Any, chunks: Any, *more: Any) -> Any:
        written[rank] = [part for chunk in chunks for part in chunk.values]
        return write(directory, rank, host, of, chunks, *more)

    monkeypatch.setattr(saving, "write_shard", note)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, masters, half_model)
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path, optimizer, asynchronous=asynchronous).wait()
        groups = optimizer.sharded_model.sharded_groups
        own = [a for group in groups for a in (group.buffers.flat, *group.states.values())]
        assert len(written[collectives.rank]) > 3
        for part in written[collectives.rank]:
            in_place = any(np.shares_memory(part, array) for array in own)
            assert in_place is not asynchronous

    run_ranks(2, run)


def test_one_save_is_in_flight_at_most(tmp_path: Path, go: threading.Event) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        first = save_checkpoint(tmp_path, optimizer, step=1, asynchronous=True)
        timer = threading.Timer(0.5, go.set)
        timer.start()
        second = save_checkpoint(tmp_path, optimizer, step=2, asynchronous=True)
        assert first is second
        assert second.waited_s > 0.1
        assert CheckpointDirectory(tmp_path).steps() == [1]
        second.wait()
        timer.join()

    run_ranks(2, run)
    assert CheckpointDirectory(tmp_path).steps() == [1, 2]


@pytest.mark.parametrize("when", ["update", "save", "wait", "ctrl-c"])
def test_what_fails_while_a_step_is_written_reaches_all_ranks(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_shard

    def fail(directory: Path, rank: int, *more: Any) -> Any:
        if rank == 1 and when == "ctrl-c":
            raise KeyboardInterrupt
        if rank == 1:
            raise CheckpointError(directory / "shard", "cannot be written: no space left")
        return write(directory, rank, *more)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        if collectives.rank == 0:
            monkeypatch.setattr(saving, "write_shard", fail)
        collectives.all_gather_object(None)
        expected: Any = CheckpointError
        if when == "ctrl-c":
            # It stays one.
            expected = (CheckpointError, KeyboardInterrupt)[collectives.rank]
        else:
            saver = save_checkpoint(tmp_path, optimizer, step=1, asynchronous=True)
        with pytest.raises(expected) as caught:
            if when == "update":
                while True:
                    train(optimizer, range(1, 2))
            elif when == "wait":
                saver.wait()
            else:
                save_checkpoint(tmp_path, optimizer, step=2)
        if expected is CheckpointError:
            why = "KeyboardInterrupt()" if when == "ctrl-c" else "no space left"
            assert f"{why} (rank 1 on " in str(caught.value)
        assert when == "ctrl-c" or saver.saving is None
        collectives.all_gather_object(None)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        if collectives.rank == 0:
            monkeypatch.setattr(saving, "write_shard", write)
        collectives.all_gather_object(None)
        # The next one is as good as the first.
        save_checkpoint(tmp_path, optimizer, step=2)

    run_ranks(2, run)
    assert CheckpointDirectory(tmp_path).steps() == [2]


def test_retention(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        for step in range(1, 8):
            save_checkpoint(tmp_path, optimizer, step=step, keep_last=2, keep_every=3)
        with pytest.raises(ValueError, match="keep_last must be positive or None, not 0"):
            save_checkpoint(tmp_path, optimizer, step=9, keep_last=0)
        with pytest.raises(ValueError, match="keep_every says"):
            save_checkpoint(tmp_path, optimizer, step=9, keep_every=2)

    run_ranks(2, run)
    assert CheckpointDirectory(tmp_path).steps() == [3, 6, 7]


def test_what_only_pickle_could_keep_is_refused(tmp_path: Path) -> None:
    class Odd:
        def serialize(self, serializer: Any) -> None:
            serializer("odd", np.array([object()]))

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        with pytest.raises(CheckpointError, match=r"mine/odd: cannot be saved: .*only pickle"):
            save_checkpoint(tmp_path, optimizer, objects={"mine": Odd()})

    run_ranks(2, run)
    assert not list(tmp_path.glob("*"))


DONE_BY_ONE = {
    "save": save_checkpoint,
    "load": load_checkpoint,
    "lock": lambda path, optimizer: saving.Saver(path, {"main": optimizer}).lock(),
    "consolidate": lambda path, optimizer: optimizer.consolidate(),
    "make": lambda path, optimizer: saving.Saver(path, {"main": optimizer}),
}


@pytest.mark.parametrize("what", DONE_BY_ONE)
def test_what_only_some_ranks_do_is_an_error_on_all_and_no_hang(tmp_path: Path, what: str) -> None:
    save(tmp_path, 2)
    words = "the ranks do different things"
    if what == "make":
        words = "rank 0 has in the background: Saver, but rank 1 has done nothing"

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        with pytest.raises(RuntimeError, match=words):
            if collectives.rank == 0:
                DONE_BY_ONE[what](tmp_path, optimizer)
            if collectives.rank == 1 or what == "make":
                train(optimizer, FIRST)

    run_ranks(2, run)
