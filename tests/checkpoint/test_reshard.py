"""``smorms3-dist checkpoint reshard``: the same step for other ranks."""

from __future__ import annotations

import logging
import os
import tracemalloc
from pathlib import Path
from typing import Any

from smorms3_dist import load_checkpoint, save_checkpoint
from smorms3_dist.checkpoint.files import CheckpointDirectory, StepReader
from smorms3_dist.collectives.threads import ThreadCollectives, run_ranks

import checkpoints
import models
import pytest
from converting import fail, save_large, save_trainer, sharded_trainer, succeed
from test_resume import (
    FIRST,
    LAST,
    assert_same_states,
    dynamic,
    facts,
    flip,
    half_model,
    make,
    train,
)


def save(directory: Path, world_size: int) -> list[Any]:
    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, dynamic, half_model)
        optimizer.update()
        train(optimizer, FIRST)
        save_checkpoint(directory, optimizer)
        return optimizer

    return run_ranks(world_size, run)


def load(directory: Path, world_size: int) -> list[Any]:
    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, dynamic, half_model, seed=9)
        load_checkpoint(directory, optimizer)
        return optimizer

    return run_ranks(world_size, run)


def test_a_step_can_go_through_many_world_sizes(tmp_path: Path) -> None:
    saved = save(tmp_path / "4", 4)
    succeed("reshard", tmp_path / "4", tmp_path / "2", "--ranks", 2)
    succeed("reshard", tmp_path / "2", tmp_path / "5", "--ranks", 5)
    succeed("verify", tmp_path / "5")
    succeed("diff", tmp_path / "4", tmp_path / "5")
    for world_size in (3, 5):
        loaded = load(tmp_path / "5", world_size)
        assert_same_states(models.gathered_states(loaded), models.gathered_states(saved))
        for optimizer in loaded:
            assert facts(optimizer) == facts(saved[0])
            models.assert_same_bits(optimizer.target, saved[0].target)
    # And the training goes on as from the original.
    ours, theirs = load(tmp_path / "5", 2), load(tmp_path / "4", 2)

    def go_on(optimizers: list[Any], collectives: ThreadCollectives) -> None:
        optimizers[collectives.rank].communicator = collectives
        train(optimizers[collectives.rank], LAST, collectives.rank)

    for optimizers in (ours, theirs):
        run_ranks(2, lambda collectives, o=optimizers: go_on(o, collectives))
    models.assert_same_bits(ours[0].target, theirs[0].target)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 1000])
def test_shards_are_equal_parts(tmp_path: Path, ranks: int) -> None:
    model = checkpoints.example()
    with CheckpointDirectory(tmp_path / "a") as directory:
        checkpoints.save(directory, 5, model)
    succeed("reshard", tmp_path / "a", tmp_path / "b", "--ranks", ranks)
    directory = CheckpointDirectory(tmp_path / "b")
    with StepReader(directory, 5) as reader:
        checkpoints.assert_equal(checkpoints.read_all(reader), model)
        manifest = reader.manifest
    assert manifest.world_size == ranks
    owned = [
        sum(
            (segment.stop - segment.start) * int(manifest.dtypes[segment.array][-2:]) // 8
            for segment in file.segments
        )
        for file in manifest.files
        if file.kind == "shard"
    ]
    assert len(owned) == ranks
    assert max(owned) - min(owned) <= 16
    if ranks <= 7:
        succeed("verify", tmp_path / "b")


def test_the_trainer_goes_on_as_when_the_original_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "smorms3_dist")
    save_trainer(tmp_path / "4", 4, iterations=8)
    succeed("reshard", tmp_path / "4", tmp_path / "2", "--ranks", 2)
    succeed("reshard", tmp_path / "2", tmp_path / "back", "--ranks", 4)

    def state(name: str, collectives: ThreadCollectives) -> Any:
        trainer, checkpoint = sharded_trainer(collectives, tmp_path / name, seed=1)
        assert checkpoint.maybe_load(trainer) == 8
        iterator = trainer.updater.get_iterator("main")
        norm = trainer.updater.get_optimizer("main").target.norm
        # 8 batches of 4, of 24 items: 1 1/3 epochs.
        return (
            trainer.updater.iteration,
            (iterator.epoch, iterator.current_position, iterator.is_new_epoch),
            [array.tolist() for array in (norm.avg_mean, norm.avg_var)],
        )

    for world_size in (2, 3):
        expected = run_ranks(world_size, lambda c: state("4", c))
        assert expected[0][:2] == (8, (1, 8, False))
        # Of the four trainers, two are left.
        assert run_ranks(world_size, lambda c: state("2", c))[:2] == expected[:2]
    # The two ranks of which nothing is left have what the other two have.
    assert [each[:2] for each in run_ranks(4, lambda c: state("back", c))] == [expected[0][:2]] * 4
    assert any("the checkpoint is of other ranks" in record.message for record in caplog.records)


def test_what_is_local_to_hosts_becomes_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints.example()
    with CheckpointDirectory(tmp_path / "a", "node0") as directory:
        path = checkpoints.save(directory, 5, model, 3, lambda m: checkpoints.edited(m, local=True))
    succeed("reshard", tmp_path / "a", tmp_path / "b", "--ranks", 2)
    with StepReader(CheckpointDirectory(tmp_path / "b"), 5) as reader:
        assert not reader.manifest.local
        checkpoints.assert_equal(checkpoints.read_all(reader), model)
    # The files of one host alone are not enough.
    (path / "shard-00002.safetensors").unlink()
    error = fail(capsys, "reshard", tmp_path / "a", tmp_path / "c", "--ranks", 2, "--step", 5)
    assert "each host has its own files, and this one is of rank 2 on host node1" in error


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "rank-00001.safetensors"])
def test_damage_is_found_and_nothing_left(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", 2)
    path = CheckpointDirectory(tmp_path / "a").path_of(3) / file
    flip(path, path.stat().st_size - 5)
    error = fail(capsys, "reshard", tmp_path / "a", tmp_path / "b", "--ranks", 3)
    assert f"{file}: is damaged: wrong checksum" in error
    assert os.listdir(tmp_path / "b") == [".lock"]


def test_nothing_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with CheckpointDirectory(tmp_path) as directory:
        checkpoints.save(directory, 3, checkpoints.tiny())
    error = fail(capsys, "reshard", tmp_path, tmp_path, "--ranks", 3)
    assert "has a step 3 already" in error
    assert CheckpointDirectory(tmp_path).manifest(3).world_size == 2
    with CheckpointDirectory(tmp_path / "busy") as other:
        other.lock()
        error = fail(capsys, "reshard", tmp_path, tmp_path / "busy", "--ranks", 3)
    assert f"is being written to by process {os.getpid()} on host" in error


def test_memory_is_bounded(tmp_path: Path) -> None:
    nbytes = save_large(tmp_path / "a")
    assert nbytes > 55e6
    tracemalloc.start()
    try:
        succeed("reshard", tmp_path / "a", tmp_path / "b", "--ranks", 3)
        peak = tracemalloc.get_traced_memory()[1]
        # A block of a MiB of each of the two shards, and little beside that.
        assert peak < 12 << 20
    finally:
        tracemalloc.stop()
    succeed("diff", tmp_path / "a", tmp_path / "b")
