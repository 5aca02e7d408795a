"""Where iterators go on: those of loops, at any world size, and ChainerMN's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist import CheckpointError, load_checkpoint, save_checkpoint

import mpirun
import numpy as np
import pytest
from chainer.iterators import MultithreadIterator, SerialIterator
from rank_threads import ThreadCollectives, run_ranks
from resuming import make, train

EXAMPLES = 24
MAKERS: dict[str, Callable[[Any], Any]] = {
    "in order": lambda data: SerialIterator(data, 2, shuffle=False),
    "shuffled": lambda data: SerialIterator(data, 2),
    "threads": lambda data: MultithreadIterator(data, 2, n_threads=1),
}


def part_of(collectives: ThreadCollectives, examples: int = EXAMPLES) -> list[int]:
    return list(range(examples))[collectives.rank :: collectives.size]


def save(directory: Path, size: int, kind: str, batches: int) -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer, iterator = make(collectives), MAKERS[kind](part_of(collectives))
        optimizer.update()
        train(optimizer, range(1, 3))
        for _ in range(batches):
            next(iterator)
        save_checkpoint(directory, optimizer, objects={"iterator": iterator})
        iterator.finalize()

    run_ranks(size, run)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("size", [1, 3])
def test_iterators_of_a_loop_move_to_another_world_size(
    kind: str, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From 2 ranks with 12 examples each, after a pass and 8 of the next."""
    save(tmp_path, 2, kind, 10)
    caplog.clear()

    def run(collectives: ThreadCollectives) -> list[int]:
        optimizer, data = make(collectives, seed=9), part_of(collectives)
        iterator = MAKERS[kind](data)
        load_checkpoint(tmp_path, optimizer, objects={"iterator": iterator})
        assert iterator.epoch == 1
        assert iterator.epoch_detail == pytest.approx(1 + 8 / 12, abs=1 / len(data))
        left = len(data) - iterator.current_position
        rest = [next(iterator) for _ in range(left // 2)]
        iterator.finalize()
        return [each for batch in rest for each in batch]

    for rest in run_ranks(size, run):
        assert len(set(rest)) == len(rest)
    (said,) = caplog.messages
    assert "the order of what is left of the epoch is drawn anew" in said
    assert "stay as they are" not in said


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_is_replaced_where_an_iterator_does_not_fit(kind: str, tmp_path: Path) -> None:
    save(tmp_path, 2, kind, 5)

    def run(collectives: ThreadCollectives) -> None:
        optimizer = make(collectives, seed=9)
        # Rank 1 alone has less to read now.
        examples = EXAMPLES if collectives.rank == 0 else 8
        iterator = MAKERS[kind](part_of(collectives, examples))
        first = next(iterator)
        detail = iterator.epoch_detail
        other = SerialIterator(range(4), 1)
        before = [param.array.copy() for param in optimizer.target.params()]
        with pytest.raises(CheckpointError, match=r"iterator.* does not fit.*rank 1"):
            load_checkpoint(tmp_path, optimizer, objects={"iterator": iterator})
        with pytest.raises(CheckpointError, match=r"has no other/current_position"):
            load_checkpoint(tmp_path, optimizer, objects={"other": other})
        assert iterator.epoch_detail == detail
        assert len(first) == 2
        assert optimizer.t == 0
        for param, values in zip(optimizer.target.params(), before, strict=True):
            np.testing.assert_array_equal(param.array, values)
        iterator.finalize()

    run_ranks(2, run)


def test_an_iterator_without_a_position_stays_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd:
        """An iterator of the user's own."""

        epoch_detail = "unknown"
        count = 3

        def serialize(self, serializer: Any) -> None:
            self.count = serializer("count", self.count)

    def run(collectives: ThreadCollectives) -> None:
        optimizer, odd = make(collectives), Odd()
        if collectives.size == 2:
            save_checkpoint(tmp_path, optimizer, objects={"odd": odd})
        else:
            odd.count = 5
            load_checkpoint(tmp_path, optimizer, objects={"odd": odd})
            assert odd.count == 5

    run_ranks(2, run)
    with caplog.at_level(logging.WARNING):
        run_ranks(1, run)
    assert "these iterators stay as they are: odd" in caplog.text


def test_iterators_of_chainermn_go_on(tmp_path: Path) -> None:
    reports = mpirun.run_program(2, "iterators.py", str(tmp_path), "save")
    for rank, report in enumerate(reports):
        for kind, facts in report["facts"].items():
            resumed, whole = facts["resumed"], facts["whole"]
            assert resumed["W"] == whole["W"], (rank, kind)
            assert facts["first"]["batches"] + resumed["batches"] == whole["batches"], (rank, kind)
    first, second = (report["facts"] for report in reports)
    for kind in first:
        assert first[kind]["whole"]["batches"] == second[kind]["whole"]["batches"]
    for report in mpirun.run_program(3, "iterators.py", str(tmp_path), "resume"):
        for facts in report["facts"].values():
            assert facts["resumed"]["started"] == pytest.approx(1.5)
            assert len(facts["resumed"]["batches"]) == 5
