"""Npz files that are written as streams: damage, disks and memory."""

from __future__ import annotations

import io
import os
import resource
import signal
import tracemalloc
from pathlib import Path
from typing import Any

from smorms3_dist import CheckpointError
from smorms3_dist.checkpoint.files import CheckpointDirectory
from smorms3_dist.checkpoint.tools.npz import NONE, Entry, new_npz

import numpy as np
import pytest
from converting import fail, save_large, save_trainer, succeed


def test_none_is_what_numpy_writes_and_reads(tmp_path: Path) -> None:
    with new_npz(tmp_path / "a.npz") as writer:
        writer.add("a", None)
    with np.load(tmp_path / "a.npz", allow_pickle=True) as found:
        assert found["a"].item() is None
        assert (found["a"].shape, found["a"].dtype) == ((), np.dtype(object))
    # The header is NumPy's own; of the pickle, NumPy 2 renames a module.
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(None))
    assert file.getvalue()[:128] == NONE[:128]


def test_a_damaged_checkpoint_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trainer(tmp_path / "ck", 2)
    path = CheckpointDirectory(tmp_path / "ck").path_of(4) / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
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
    nbytes = save_large(tmp_path / "ck")
    # A block of a MiB of each of the two shards, and little beside that.
    for options in ([], ["--compress"]):
        tracemalloc.start()
        try:
            succeed("export", tmp_path / "ck", tmp_path / f"{len(options)}.npz", *options)
            assert tracemalloc.get_traced_memory()[1] < 12 << 20 < nbytes / 4
        finally:
            tracemalloc.stop()
        (tmp_path / f"{len(options)}.npz").unlink()
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


def test_a_file_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield np.zeros(3)
        raise CheckpointError("x", "is broken")

    with (
        pytest.raises(CheckpointError, match="is broken"),
        new_npz(tmp_path / "a.npz") as writer,
    ):
        writer.add("x", Entry(np.dtype("f8"), (), lambda: [np.array(3.0)]))
        writer.add("y", Entry(np.dtype("f8"), (6,), broken))
    assert os.listdir(tmp_path) == []
