"""Npz files that are read and written as streams: what is refused, damage, disks and memory."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

from smorms3_dist import (
    CheckpointError,
)
from smorms3_dist.checkpoint.files import CheckpointDirectory, StepReader
from smorms3_dist.checkpoint.tools.npz import NONE, NpzReader, new_npz

import models
import numpy as np
import pytest
from chainer.optimizers import SMORMS3
from converting import (
    command,
    fail,
    rank_file,
    save_chainer,
    save_large,
    save_trainer,
    succeed,
)

# Npy files


def npy(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(value), **options)
    return file.getvalue()


def write_zip(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key, data in entries.items():
            file.writestr(f"{key}.npy", data)


def test_none_is_what_numpy_writes_and_reads(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.npz", {"a": npy(None), "b": NONE})
    with NpzReader(tmp_path / "a.npz") as reader:
        assert all(member.is_none for member in reader.members.values())
        assert reader.value("a") is None
    with np.load(tmp_path / "a.npz", allow_pickle=True) as found:
        assert found["a"].item() is None
        assert found["b"].item() is None
        assert (found["b"].shape, found["b"].dtype) == ((), np.dtype(object))


def none_by_old_numpy(protocol: int) -> bytes:
    """What a NumPy that has no ``numpy._core`` pickles, with integers for booleans."""
    data = pickle.dumps(np.asarray(None), protocol)
    data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    data = data.replace(b"\x8c\x16numpy.core", b"\x8c\x15numpy.core")
    data = data.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
    if protocol == 4:
        data = data[:3] + (len(data) - 11).to_bytes(8, "little") + data[11:]
    return npy(None)[: npy(None).index(b"\n") + 1] + data


@pytest.mark.parametrize("protocol", [3, 4])
def test_none_is_recognized_from_older_versions_of_numpy(tmp_path: Path, protocol: int) -> None:
    write_zip(tmp_path / "a.npz", {"a": none_by_old_numpy(protocol)})
    with np.load(tmp_path / "a.npz", allow_pickle=True) as found:
        assert found["a"].item() is None
    with NpzReader(tmp_path / "a.npz") as reader:
        assert reader.members["a"].is_none


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


def objects(value: Any) -> bytes:
    array = np.empty((), object)
    array[()] = value
    return npy(array)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(objects(Bomb()), id="bomb"),
        pytest.param(objects(7), id="number"),
        pytest.param(npy(np.array([None])), id="list of None"),
        pytest.param(npy(None) + b"x", id="None and more"),
        pytest.param(npy(None)[:-1], id="a part of None"),
        pytest.param(NONE.replace(b"_reconstruct", b"_deconstruct"), id="other function"),
    ],
)
def test_no_pickle_is_ever_loaded(
    tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write_zip(tmp_path / "a.npz", {"updater/iteration": npy(3), "extensions/x/y": data})
    error = fail(capsys, "import", tmp_path / "a.npz", tmp_path / "ck")
    assert "'extensions/x/y' is an array of objects other than None: a pickle" in error
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.array(b"bytes")), "is an array of |S5, which a checkpoint cannot hold"),
        (npy(1j), "is an array of complex128, which a checkpoint cannot hold"),
        (npy(np.zeros(2, "m8[s]")), "which a checkpoint cannot hold"),
        (npy(np.zeros(2, "i4,f4")), "has no header of a plain array"),
        (npy(np.zeros(2), version=(2, 0)), "has no header of a plain array"),
        (npy(np.zeros(3))[:-1], "it is damaged"),
        (npy(np.zeros(3)) + b"x", "it is damaged"),
        (npy(np.zeros(3))[:20], "has no header of a plain array"),
        (b"", "has no header of a plain array"),
        (npy(np.zeros(3)).replace(b"(3,)", b"(" + b"9" * 19 + b",)"), "has no header"),
        (npy(np.zeros(3)).replace(b"(3,), }      ", b"(300000000,)}"), "has no header"),
        (npy(np.zeros(3)).replace(b"(3,), }      ", b"(30000,), }  "), "it is damaged"),
        (
            npy(np.array([True, False]))[:-2] + b"\x02\x00",
            "booleans",
        ),
    ],
)
def test_what_no_checkpoint_can_hold_is_named(
    tmp_path: Path, data: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_chainer(tmp_path / "a.npz", models.Model({"a": (3,)}), SMORMS3())
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as file:
        file.writestr("extensions/x/y.npy", data)
    error = fail(capsys, "import", tmp_path / "a.npz", tmp_path / "ck")
    assert "'extensions/x/y'" in error
    assert reason in error
    assert not (tmp_path / "ck").exists() or os.listdir(tmp_path / "ck") == [".lock"]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({}, "is no snapshot of a trainer"),
        ({"l1/W": npy(np.zeros(3))}, "is no snapshot of a trainer"),
        ({"updater/optimizer:main/epoch": npy(1)}, "'updater/optimizer:main/t' is missing"),
        ({"updater/optimizer:main/t": npy(1.5)}, "is 1.5 and not an integer from 0 on"),
        ({"updater/optimizer:main/t": npy(-1)}, "is -1 and not an integer"),
        ({"updater/optimizer:main/t": npy([1])}, "is not one number"),
        ({"updater/optimizer:main/t": npy("x")}, "is not one number"),
        ({"updater/optimizer:main/t": NONE}, "is not one number"),
        (
            {
                "updater/optimizer:main/t": npy(1),
                "updater/optimizer:main/smorms3_dist/version": npy(2),
            },
            "was written by a later version of smorms3_dist (format 2",
        ),
        (
            {
                "updater/optimizer:main/t": npy(1),
                "updater/optimizer:main/smorms3_dist/rank": npy(1),
                "updater/optimizer:main/smorms3_dist/world_size": npy(4),
            },
            "has the states of rank 1 of 4 only",
        ),
        (
            {
                "updater/optimizer:main/t": npy(1),
                "updater/optimizer:main/smorms3_dist/loss_scale": npy(np.inf),
            },
            "is inf",
        ),
    ],
)
def test_what_is_no_snapshot_of_a_trainer_is_refused(
    tmp_path: Path, entries: dict[str, bytes], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_zip(tmp_path / "a.npz", entries)
    assert reason in fail(capsys, "import", tmp_path / "a.npz", tmp_path / "ck")
    assert not (tmp_path / "ck").exists()


def test_what_is_no_npz_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("x" * 1000)
    os.mkfifo(tmp_path / "pipe")
    write_zip(tmp_path / "twice", {"a": npy(1)})
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "twice", "a") as file:
        warnings.simplefilter("ignore")
        file.writestr("a.npy", npy(2))
    with zipfile.ZipFile(tmp_path / "other", "w") as file:
        file.writestr("a.txt", "x")
    write_zip(tmp_path / "two", {"a": npy(1), "b": npy(2)})
    two = (tmp_path / "two").read_bytes()
    entry = two.index(b"PK\1\2")
    swallowing = two[: entry + 32] + b"\x50" + two[entry + 33 :]
    (tmp_path / "swallowed").write_bytes(swallowing)
    (tmp_path / "more").write_bytes(two + b"\0")
    with zipfile.ZipFile(tmp_path / "odd", "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("a.npy", npy(1))
    for name, reason in (
        ("nowhere", "cannot be opened: No such file"),
        (".", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("text", "cannot be read: File is not a zip file"),
        ("twice", "'a.npy' occurs twice, or is no npy file"),
        ("other", "'a.txt' occurs twice, or is no npy file"),
        ("odd", "is compressed in a way that NumPy does not know"),
        ("swallowed", "its directory is damaged"),
        ("more", "it does not end with its directory"),
    ):
        assert reason in fail(capsys, "import", tmp_path / name, tmp_path / "ck")


def test_arrays_in_any_order_and_byte_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((70, 90, 110)).astype("f4")
    write_zip(
        tmp_path / "a.npz",
        {
            "updater/optimizer:main/t": npy(3),
            "updater/optimizer:main/l/W/t": npy(3),
            "updater/optimizer:main/l/W/g": npy(values.astype(">f4")),
            "updater/optimizer:main/l/W/mem": npy(np.asfortranarray(values).astype(">f4")),
            "updater/model:main/l/W": npy(np.asfortranarray(values)),
            "updater/model:main/l/seen": npy(np.asfortranarray(values[0].astype("f8"))),
        },
    )
    succeed("import", tmp_path / "a.npz", tmp_path / "ck", "--ranks", 3)
    with StepReader(CheckpointDirectory(tmp_path / "ck"), 3) as reader:
        for kind, state in (("param", None), ("state", "g"), ("state", "mem")):
            out = np.empty(values.shape, "f4")
            reader.read(kind, state, "/l/W", 0, out.size, out)
            np.testing.assert_array_equal(out, values)
    arrays, _ = rank_file(tmp_path / "ck")
    assert arrays["models/main/l/seen"] == values[0].astype("f8").tobytes()
    assert arrays["trainer/updater/model:main/l/seen"] == arrays["models/main/l/seen"]


# Damage, and what happens to files


def test_no_damage_gets_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes are flipped all over a snapshot: it is refused, or the bytes meant nothing."""
    save_chainer(tmp_path / "good", models.Model({"a": (3, 5), "g": (200,)}), SMORMS3())
    succeed("import", tmp_path / "good", tmp_path / "ck", "--step", 1)
    good = (tmp_path / "good").read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    # Half of them in the directory, where it hurts most.
    directory = good.index(b"PK\1\2")
    for step in range(2, 302):
        data = bytearray(good)
        start = directory if step % 2 else 0
        data[random.integers(start, len(data))] ^= 1 << random.integers(8)
        (tmp_path / "bad").write_bytes(bytes(data))
        if command("import", tmp_path / "bad", tmp_path / "ck", "--step", step):
            refused += 1
            assert capsys.readouterr().err.count("\n") == 1
        else:
            places = (tmp_path / "ck", "--step", 1, "--other-step", step)
            succeed("diff", *places)
    assert refused > 150
    for length in random.integers(0, len(good), 50):
        (tmp_path / "bad").write_bytes(good[:length])
        fail(capsys, "import", tmp_path / "bad", tmp_path / "ck")
    assert not [name for name in os.listdir(tmp_path / "ck") if name.startswith(".saving")]


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
    succeed("export", tmp_path / "ck", tmp_path / "p.npz")
    succeed("import", tmp_path / "p.npz", tmp_path / "imported")
    error = fail(capsys, "import", tmp_path / "p.npz", tmp_path / "imported")
    assert "has a step 1 already" in error
    succeed("import", tmp_path / "p.npz", tmp_path / "imported", "--step", 2)
    assert CheckpointDirectory(tmp_path / "imported").steps() == [1, 2]


def test_a_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import resource
    import signal

    save_large(tmp_path / "ck")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, before[1]))
    try:
        error = fail(capsys, "export", tmp_path / "ck", tmp_path / "o.npz")
        assert "cannot be written: File too large" in error
        error = fail(capsys, "reshard", tmp_path / "ck", tmp_path / "r", "--ranks", 1)
        assert "cannot be written: File too large" in error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(os.listdir(tmp_path)) == ["ck", "r"]
    assert os.listdir(tmp_path / "r") == [".lock"]


def test_memory_is_bounded(tmp_path: Path) -> None:
    nbytes = save_large(tmp_path / "ck")
    assert nbytes > 55e6
    for options in ([], ["--compress"]):
        name = f"o{len(options)}.npz"
        for arguments, limit in (
            # A block of a MiB of each of the two shards, and little beside that.
            (("export", tmp_path / "ck", tmp_path / name, *options), 12 << 20),
            (("import", tmp_path / name, tmp_path / f"{name}.ck", "--ranks", 3), 6 << 20),
        ):
            tracemalloc.start()
            try:
                succeed(*arguments)
                assert tracemalloc.get_traced_memory()[1] < limit
            finally:
                tracemalloc.stop()
        succeed("diff", tmp_path / "ck", tmp_path / f"{name}.ck")


def test_a_file_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield np.zeros(3)
        raise CheckpointError("x", "is broken")

    with (
        pytest.raises(CheckpointError, match="is broken"),
        new_npz(tmp_path / "a.npz") as writer,
    ):
        writer.add_value("x", np.array(3))
        writer.add("y", np.dtype("f8"), (6,), broken())
    assert os.listdir(tmp_path) == []
