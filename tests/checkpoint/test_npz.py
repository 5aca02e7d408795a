"""Npz files that are written as streams: damage, disks and memory."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

from smorms3_dist.checkpoint.files import CheckpointDirectory

import checkpoints
import models
import pytest
from converting import fail, save_trainer, succeed
from resuming import save


def test_a_damaged_checkpoint_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trainer(tmp_path / "ck", 2)
    path = CheckpointDirectory(tmp_path / "ck").path_of(4) / "shard-00001.safetensors"
    checkpoints.flip(path, path.stat().st_size - 3)
    error = fail(capsys, "export", tmp_path / "ck", tmp_path / "o.npz")
    assert "shard-00001.safetensors: is damaged: wrong checksum" in error
    assert "of rank 1 on host" in error
    assert os.listdir(tmp_path) == ["ck"]


def test_files_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trainer(tmp_path / "ck", 1, iterations=1)
    (tmp_path / "o.npz").write_text("mine")
    error = fail(capsys, "export", tmp_path / "ck", tmp_path / "o.npz")
    assert "o.npz: exists already" in error
    assert (tmp_path / "o.npz").read_text() == "mine"
    error = fail(capsys, "export", tmp_path / "ck", tmp_path / "no" / "o.npz")
    assert "cannot be written: No such file or directory" in error


def test_memory_is_bounded_and_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"a": (1000, 1250), "b": (625_000,)}
    save(tmp_path / "ck", 2, make_model=lambda: models.Model(shapes))
    nbytes = 4 * 4 * 1_875_000
    # A block of a MiB of each of the two shards, and little beside that.
    for options in ([], ["--compress"]):
        with checkpoints.memory_below(nbytes // 4):
            succeed("export", tmp_path / "ck", tmp_path / "o.npz", *options)
        (tmp_path / "o.npz").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, before[1]))
    try:
        error = fail(capsys, "export", tmp_path / "ck", tmp_path / "o.npz")
        assert "cannot be written: File too large" in error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["ck"]
