"""Snapshots of a Trainer: by ChainerMN's checkpointer, this package's extension, and others."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from smorms3_dist.extensions import snapshot

import chainer
import models
import mpirun
import numpy as np
import process
import pytest
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater

pytestmark = pytest.mark.mpi


WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3])
BEFORE, AFTER = 5, 11
"""Updates before the snapshot, and in all."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all trainings."""
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def trained(place: Path) -> dict[int, list[dict[str, Any]]]:
    """What the ranks report, by size of their world."""
    return mpirun.run_worlds(3, "snapshots.py", "every", str(place))


@WORLD_SIZES
@pytest.mark.parametrize("how", ["checkpointer", "extension", "thread"])
def test_a_training_resumes_bit_for_bit(
    trained: dict[int, list[dict[str, Any]]], place: Path, world_size: int, how: str
) -> None:
    for values in trained[world_size]:
        uninterrupted = values[how]["uninterrupted"]
        assert values[how]["resumed"] == {"at": BEFORE, **uninterrupted}
        assert (uninterrupted["t"], uninterrupted["iteration"]) == (AFTER - 1, AFTER)
    if how != "checkpointer":
        files = [path.name for path in (place / f"{how} {world_size}").iterdir()]
        assert files == [f"snapshot_iter_{BEFORE}"]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_the_extensions_snapshot_is_one_file_for_any_world_size(
    trained: dict[int, list[dict[str, Any]]], before: int, after: int
) -> None:
    # All ranks have the same gradients: every world size does the same.
    alone = trained[1][0]["extension"]["uninterrupted"]
    for values in trained[after]:
        ours = values["resumed of others"]
        if 3 in (before, after):  # A third of three times something is not always the same.
            alone = {**alone, "parameters": ours["parameters"]}
        assert ours == {"at": BEFORE, **alone}


@pytest.mark.parametrize("how", ["plain on rank 0", "multi_node_snapshot"])
def test_a_snapshot_that_would_lose_states_ends_the_job_with_the_remedy(
    tmp_path: Path, how: str
) -> None:
    status, output = process.run(
        *mpirun.command(2, mpirun.PROGRAMS / "snapshots.py", how, tmp_path),
        env=mpirun.environment(),
        limit=60,
    )
    assert status != 0
    assert "would hold the optimizer states of rank 0 alone, 1/2 of them" in output
    assert "smorms3_dist.extensions.snapshot" in output
    assert not any(tmp_path.iterdir())


def trainer_of(optimizer: Any, out: Path) -> Trainer:
    data = chainer.datasets.TupleDataset(np.zeros((4, 1), np.float32))
    updater = StandardUpdater(chainer.iterators.SerialIterator(data, 2), optimizer)
    trainer = Trainer(updater, out=out)
    trainer._start_at = 0.0  # As if running.
    return trainer


def test_a_slow_writer_writes_what_was_there_when_it_was_called(tmp_path: Path) -> None:
    written: list[dict[str, Any]] = []

    def slow(filename: str, outdir: str, target: dict[str, Any]) -> None:
        written.append(target)

    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, range(4))
        before = {name: array.copy() for name, array in models.arrays(optimizer.target).items()}
        snapshot(writer=slow)(trainer_of(optimizer, tmp_path))
        models.train(optimizer, rank, [4])
        for name, array in models.arrays(optimizer.target).items():
            assert not array.size or array.tobytes() != before[name].tobytes()
            if rank == 0:
                assert written[0][f"updater/model:main{name}"].tobytes() == before[name].tobytes()

    models.on_ranks(2, body)
    assert len(written) == 1


def test_the_condition_of_rank_0_decides(tmp_path: Path) -> None:
    asked: list[int] = []

    def body(optimizer: Any, rank: int) -> None:
        optimizer.update()

        def condition() -> bool:
            asked.append(rank)
            return len(asked) > 1

        extension = snapshot(condition=condition)
        for expected in (0, 1):
            extension(trainer_of(optimizer, tmp_path))
            optimizer.communicator.all_gather_object(None)
            assert len(list(tmp_path.iterdir())) == expected

    models.on_ranks(2, body)
    assert asked == [0, 0]


def test_what_cannot_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"snapshot_on_error=True is not supported"):
        snapshot(snapshot_on_error=True)
    plain = chainer.optimizers.SMORMS3().setup(models.Model())
    with pytest.raises(TypeError, match="has no sharded optimizer"):
        snapshot()(trainer_of(plain, tmp_path))
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "snapshot_iter_7").touch()
    blind: set[int] = set()
    monkeypatch.setattr(Path, "is_file", lambda path: threading.get_ident() not in blind)

    def body(optimizer: Any, rank: int) -> None:
        if rank == 1:
            blind.add(threading.get_ident())
        with pytest.raises(RuntimeError, match=r"rank 1 on \S+ does not see the snapshot"):
            snapshot(autoload=True).initialize(trainer_of(optimizer, tmp_path / str(rank)))

    models.on_ranks(2, body)
