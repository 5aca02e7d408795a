"""Manifests: read as they were written, and refused if anything in them cannot be."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
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


def test_a_flipped_byte_is_noticed_wherever_it_is(manifest: Manifest) -> None:
    data = manifest_json.dump(manifest)
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1 << index % 8
        with pytest.raises(CheckpointError, match=r"checksum is wrong|does not end with"):
            manifest_json.load(bytes(changed), "m")


def test_one_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    os.truncate(tmp_path / "m", manifest_json.MAX_BYTES + 1)
    with checkpoints.memory_below(1 << 20), pytest.raises(CheckpointError, match="the limit is"):
        manifest_json.read(tmp_path / "m")


FORMAT = {"format": manifest_json.FORMAT}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not end with its checksum"),
        (checkpoints.sealed({"a": 1}), "is no manifest"),
        (checkpoints.sealed(FORMAT), "its version is None"),
        (checkpoints.sealed({**FORMAT, "version": 0}), "its version is 0"),
        (checkpoints.sealed({**FORMAT, "version": True}), "its version is True"),
        (checkpoints.sealed({**FORMAT, "version": 1}), "'loss_scale'"),
        (checkpoints.sealed({**FORMAT, "version": 2}), "version 2 of the .*: update the package"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        manifest_json.load(data, "m")


S = ("files", 0, "segments", 0)
LEFT_OUT, TWICE = object(), object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("t",), LEFT_OUT, "missing 1 required positional argument: 't'"),
        (("extra",), 1, "unexpected keyword argument 'extra'"),
        (("files", 0, "host"), LEFT_OUT, "'host'"),
        (("parameters", 0), 3, "must be a mapping"),
        ((*S,), [], "not enough values to unpack"),
        (("files", 0, "block_bytes"), 0, r"has \d+ checksums for"),
        (("parameters", 0, "name"), "/l1/b", "parameters names a parameter twice"),
        (("parameters",), TWICE, "parameters names a parameter twice"),
        (("parameters", 0, "dtype"), "float128", "has 'float128', which is not known, for"),
        (("parameters", 0, "states", "g"), "f4", "has 'f4', which is not known, for state g"),
        (("parameters", 0, "shape"), [3, 1], "has parameter /empty up to element 0 of 3"),
        (("parameters", 1, "name"), "/other", "a segment of an unknown array in shard-0"),
        (("parameters", 3, "states", "g2"), LEFT_OUT, "a segment of an unknown array in shard-0"),
        (("parameters", 3, "states", "more"), "float32", "has state more of /l1/half up to"),
        (("parameters", 3, "master"), None, "a segment of an unknown array in shard-0"),
        (("files", 0, "path"), "rank-00000.safetensors", "files names a file twice"),
        (("files",), TWICE, "files names a file twice"),
        (("files", 1, "rank"), 1, "files has two files of kind rank for one rank"),
        (("files", 0, "blocks", 0), LEFT_OUT, r"shard-00000.safetensors has \d+ checksums for"),
        (("files", 0, "size"), 10**15, r"shard-00000.safetensors has \d+ checksums for"),
        ((*S, 1), "momentum", "a segment of an unknown array in shard-0"),
        ((*S, 3), "/none", "a segment of an unknown array in shard-0"),
        ((*S, 4), 1, "from element 1 to .* where a range that starts at 0 must come"),
        ((*S, 5), 0, "from element 0 to 0, where"),
        ((*S, 5), 10**9, "up to element 1000000000 of|where a range that starts at 1000000000"),
        ((*S,), LEFT_OUT, "where a range that starts at 0 must come|up to element 0 of"),
        (("files", 0, "segments"), TWICE, "has a tensor twice in shard-00000"),
        (("files", 2), LEFT_OUT, "where a range that starts at|up to element"),
    ],
)
def test_what_does_not_fit_together_is_named(
    manifest: Manifest, path: tuple[Any, ...], value: Any, message: str
) -> None:
    fields = json.loads(manifest_json.dump(manifest))
    manifest_json.load(checkpoints.sealed(fields), "m")
    *way, name = path
    holder = functools.reduce(operator.getitem, way, fields)
    if value is LEFT_OUT:
        del holder[name]
    elif value is TWICE:
        holder[name].append(holder[name][0])
    else:
        holder[name] = value
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
        ({"notes": functools.reduce(lambda n, _: {"x": n}, range(10**5), {})}, "cannot be written"),
    ],
    ids=["files", "nan", "key", "object", "surrogate", "deep"],
)
def test_what_could_not_be_read_is_not_written(
    manifest: Manifest, changes: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        manifest_json.dump(dataclasses.replace(manifest, **changes))
