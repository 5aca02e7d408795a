"""Manifests: read as they were written, and refused if anything in them cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import Manifest

import checkpoints
import pytest


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    model = checkpoints.example()
    files = checkpoints.write_files(tmp_path_factory.mktemp("files"), model, 3)
    return checkpoints.manifest(model, 12, 3, files)


def test_what_is_written_is_read(manifest: Manifest, tmp_path: Path) -> None:
    data = manifest_json.dump(manifest)
    (tmp_path / "m").write_bytes(data)
    read = manifest_json.read(tmp_path / "m")
    assert read == manifest
    assert manifest_json.dump(read) == data
    assert read.locations == manifest.locations


def test_it_is_json_for_people(manifest: Manifest) -> None:
    text = manifest_json.dump(manifest).decode()
    fields = json.loads(text)
    assert list(fields)[:4] == ["format", "version", "step", "t"]
    assert list(fields)[-3:] == ["parameters", "files", "checksum"]
    assert fields["hyperparameters"]["lr"] == {"float": "inf"}
    for line in text.splitlines():
        # A line has at most one checksum list, or one segment, or one small object.
        assert line.count('"param"') + line.count('"state"') <= 1
    assert f' "{fields["files"][0]["path"]}"' in text


def test_any_hyperparameter_survives(manifest: Manifest) -> None:
    values = {
        "f": 0.1,
        "tiny": 5e-324,
        "minus": -0.0,
        "big": 1.7e308,
        "i": -3,
        "b": True,
        "s": "é\n\"'",
        "n": None,
        "inf": float("inf"),
        "-inf": float("-inf"),
    }
    changed = dataclasses.replace(manifest, hyperparameters=values, loss_scale=None)
    read = manifest_json.load(manifest_json.dump(changed), "m")
    assert repr(read.hyperparameters) == repr(values)
    assert read.loss_scale is None
    nan = dataclasses.replace(manifest, hyperparameters={"x": float("nan")})
    value = manifest_json.load(manifest_json.dump(nan), "m").hyperparameters["x"]
    assert isinstance(value, float) and value != value


def test_a_flipped_byte_is_noticed_wherever_it_is(manifest: Manifest) -> None:
    data = manifest_json.dump(manifest)
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1 << index % 8
        with pytest.raises(CheckpointError, match=r"checksum is wrong|does not end with"):
            manifest_json.load(bytes(changed), "m")


def test_a_truncated_one_is_noticed_at_any_length(manifest: Manifest) -> None:
    data = manifest_json.dump(manifest)
    for length in range(len(data)):
        with pytest.raises(CheckpointError, match="does not end with its checksum"):
            manifest_json.load(data[:length], "m")


def test_one_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    os.truncate(tmp_path / "m", manifest_json.MAX_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="the limit is"):
            manifest_json.read(tmp_path / "m")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_newer_version_asks_for_an_update(manifest: Manifest) -> None:
    fields = json.loads(manifest_json.dump(manifest))
    fields |= {"version": 2, "something": "new"}
    with pytest.raises(CheckpointError, match=r"version 2 of the format.*: update the package"):
        manifest_json.load(checkpoints.sealed(fields), "m")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not end with its checksum"),
        (checkpoints.sealed({"a": 1}), "is no manifest"),
        (checkpoints.sealed({"format": manifest_json.FORMAT}), "its version is None"),
        (checkpoints.sealed({"format": manifest_json.FORMAT, "version": 0}), "its version is 0"),
        (
            checkpoints.sealed({"format": manifest_json.FORMAT, "version": True}),
            "its version is True",
        ),
        (checkpoints.sealed({"format": manifest_json.FORMAT, "version": 1}), "'loss_scale'"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        manifest_json.load(data, "m")


def put(*path: Any) -> Callable[[Any], None]:
    """Sets a field, given by the names on the way to it and the value."""

    def change(fields: Any) -> None:
        *way, name, value = path
        for step in way:
            fields = fields[step]
        fields[name] = value

    return change


def without(*path: Any) -> Callable[[Any], None]:
    def change(fields: Any) -> None:
        for step in path[:-1]:
            fields = fields[step]
        del fields[path[-1]]

    return change


def repeated(*path: Any) -> Callable[[Any], None]:
    def change(fields: Any) -> None:
        for step in path:
            fields = fields[step]
        fields.append(fields[0])

    return change


S = ("files", 0, "segments", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("t"), "missing 1 required positional argument: 't'"),
        (put("extra", 1), "unexpected keyword argument 'extra'"),
        (without("files", 0, "host"), "'host'"),
        (put("parameters", 0, 3), "must be a mapping"),
        (put(*S, []), "not enough values to unpack"),
        (put("files", 0, "block_bytes", 0), "has 93 checksums for"),
        (put("parameters", 0, "name", "/l1/b"), "parameters names a parameter twice"),
        (repeated("parameters"), "parameters names a parameter twice"),
        (put("parameters", 0, "dtype", "float128"), "has 'float128', which is not known, for"),
        (put("parameters", 0, "states", "g", "f4"), "has 'f4', which is not known, for state g"),
        (put("parameters", 0, "shape", [3, 1]), "has parameter /empty up to element 0 of 3"),
        (put("parameters", 1, "name", "/other"), "a segment of an unknown array in shard-0"),
        (without("parameters", 3, "states", "g2"), "a segment of an unknown array in shard-0"),
        (put("parameters", 3, "states", "more", "float32"), "has state more of /l1/half up to"),
        (put("parameters", 3, "master", None), "a segment of an unknown array in shard-0"),
        (put("files", 0, "path", "rank-00000.safetensors"), "files names a file twice"),
        (repeated("files"), "files names a file twice"),
        (put("files", 1, "rank", 1), "files has two files of kind rank for one rank"),
        (without("files", 0, "blocks", 0), r"shard-00000.safetensors has \d+ checksums for"),
        (put("files", 0, "size", 10**15), r"shard-00000.safetensors has \d+ checksums for"),
        (put(*S, 1, "momentum"), "a segment of an unknown array in shard-0"),
        (put(*S, 3, "/none"), "a segment of an unknown array in shard-0"),
        (put(*S, 4, 1), "from element 1 to .* where a range that starts at 0 must come"),
        (put(*S, 5, 0), "from element 0 to 0, where"),
        (put(*S, 5, 10**9), "up to element 1000000000 of|where a range that starts at 1000000000"),
        (without(*S), "where a range that starts at 0 must come|up to element 0 of"),
        (repeated("files", 0, "segments"), "has a tensor twice in shard-00000"),
        (without("files", 2), "where a range that starts at|up to element"),
    ],
)
def test_what_does_not_fit_together_is_named(
    manifest: Manifest, change: Callable[[Any], None], message: str
) -> None:
    fields = json.loads(manifest_json.dump(manifest))
    manifest_json.load(checkpoints.sealed(fields), "m")
    change(fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        manifest_json.load(checkpoints.sealed(fields), "m")
    assert caught.value.path == "m"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ()}, "up to element 0 of"),
        ({"notes": {"x": float("nan")}}, "cannot be written as JSON"),
        ({"notes": {"x": {1: 2}}}, "the key 1 is not a string"),
        ({"notes": {"x": object()}}, "cannot be written as JSON"),
        ({"notes": {"x": "\ud800"}}, "its JSON is not valid"),
    ],
)
def test_what_could_not_be_read_is_not_written(
    manifest: Manifest, changes: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        manifest_json.dump(dataclasses.replace(manifest, **changes))


def test_deep_notes_are_refused(manifest: Manifest) -> None:
    notes: Any = {}
    for _ in range(100_000):
        notes = {"x": notes}
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        manifest_json.dump(dataclasses.replace(manifest, notes=notes))
