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
    def run(save: bool, collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives)
        if save:
            save_checkpoint(tmp_path, optimizer, step=0)
        models.set_gradients(optimizer.target, collectives.rank, 1)
        optimizer.update()
        assert optimizer.t == 0
        train(optimizer, FIRST, collectives.rank)
        return optimizer

    ours, theirs = (run_ranks(2, functools.partial(run, save)) for save in (True, False))
    models.assert_same_bits(ours[0].target, theirs[0].target)

    def resumed(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, seed=9)
        load_checkpoint(tmp_path, optimizer)
        train(optimizer, FIRST, collectives.rank)
        return optimizer

    for optimizer in run_ranks(2, resumed):
        assert optimizer.t == 3
        models.assert_same_bits(optimizer.target, theirs[0].target)


class Slow:
    """Makes the writing of shards wait until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        write = saving.write_shard

        def slow(*arguments: Any, **options: Any) -> Any:
            assert self.go.wait(30)
            return write(*arguments, **options)

        monkeypatch.setattr(saving, "write_shard", slow)


def test_training_goes_on_while_a_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
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
        slow.go.set()
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

    def note(directory: Path, rank: int, host: str, parts: Any, *more: Any) -> Any:
        written[rank] = [part.values for part in parts]
        return write(directory, rank, host, parts, *more)

    monkeypatch.setattr(saving, "write_shard", note)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, masters, half_model)
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(tmp_path, optimizer, asynchronous=asynchronous).wait()
        own = []
        for group in optimizer.sharded_model.sharded_groups:
            own += [group.buffers.flat, *group.states.values()]
        values = written[collectives.rank]
        assert len(values) > 3
        for part in values:
            in_place = any(np.shares_memory(part, array) for array in own)
            assert in_place is not asynchronous

    run_ranks(2, run)


def test_ctrl_c_while_a_step_is_written_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_shard
    stopped = []

    def stop(directory: Path, rank: int, *more: Any) -> Any:
        if rank == 1 and not stopped:
            stopped.append(rank)
            raise KeyboardInterrupt
        return write(directory, rank, *more)

    monkeypatch.setattr(saving, "write_shard", stop)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        expected = (CheckpointError, KeyboardInterrupt)[collectives.rank]
        with pytest.raises(expected) as raised:
            save_checkpoint(tmp_path, optimizer)
        if collectives.rank == 0:
            assert "KeyboardInterrupt() (rank 1 on " in str(raised.value)
        # Nothing is left of it: the next save is like any other.
        save_checkpoint(tmp_path, optimizer)

    run_ranks(2, run)
    assert len(CheckpointDirectory(tmp_path).steps()) == 1


def test_one_save_is_in_flight_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        first = save_checkpoint(tmp_path, optimizer, step=1, asynchronous=True)
        timer = threading.Timer(0.2, slow.go.set)
        timer.start()
        second = save_checkpoint(tmp_path, optimizer, step=2, asynchronous=True)
        assert first is second
        assert second.waited_s > 0.1
        assert CheckpointDirectory(tmp_path).steps() == [1]
        second.wait()
        timer.join()

    run_ranks(2, run)
    assert CheckpointDirectory(tmp_path).steps() == [1, 2]


@pytest.mark.parametrize("when", ["update", "save", "wait"])
def test_what_fails_in_the_background_reaches_all_ranks(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_shard

    def fail(directory: Path, rank: int, *arguments: Any, **options: Any) -> Any:
        if rank == 1:
            raise CheckpointError(directory / "shard", "cannot be written: no space left")
        return write(directory, rank, *arguments, **options)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        if collectives.rank == 0:
            monkeypatch.setattr(saving, "write_shard", fail)
        collectives.all_gather_object(None)
        saver = save_checkpoint(tmp_path, optimizer, step=1, asynchronous=True)
        with pytest.raises(CheckpointError, match=r"no space left \(rank 1 on "):
            if when == "update":
                while True:
                    train(optimizer, range(1, 2))
            elif when == "save":
                save_checkpoint(tmp_path, optimizer, step=2)
            else:
                saver.wait()
        assert saver.saving is None
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


def test_a_second_job_is_refused_on_all_ranks(tmp_path: Path) -> None:
    with CheckpointDirectory(tmp_path) as other:
        other.lock()

        def run(collectives: ThreadCollectives) -> None:
            optimizer = make(collectives)
            optimizer.update()
            with pytest.raises(
                CheckpointError, match=r"is being written to by process .*\(rank 0 on "
            ):
                save_checkpoint(tmp_path, optimizer)

        run_ranks(2, run)


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


@pytest.mark.parametrize("what", ["save", "load", "consolidate", "lock"])
def test_what_only_some_ranks_do_is_an_error_on_all_and_no_hang(tmp_path: Path, what: str) -> None:
    save(tmp_path, 2)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        with pytest.raises(RuntimeError, match="while others make a step"):
            if collectives.rank == 0:
                train(optimizer, FIRST)
            elif what == "save":
                save_checkpoint(tmp_path, optimizer)
            elif what == "load":
                load_checkpoint(tmp_path, optimizer)
            elif what == "lock":
                saving.Saver(tmp_path, {"main": optimizer}).lock()
            else:
                optimizer.consolidate()

    run_ranks(2, run)


def test_a_checkpoint_extension_on_some_ranks_only_is_named_at_the_next_step(
    tmp_path: Path,
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives)
        optimizer.update()
        if collectives.rank == 0:
            saving.Saver(tmp_path, {"main": optimizer})
        message = r"rank 0 has in the background: Saver, but rank 1 has done nothing"
        with pytest.raises(RuntimeError, match=message):
            train(optimizer, FIRST)

    run_ranks(2, run)
