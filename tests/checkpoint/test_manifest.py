"""Manifests: read as they were written, and refused if anything in them cannot be."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import Manifest

import checkpoints
import pytest
from checkpoints import LEFT_OUT, TWICE


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
    assert [parameter.name for parameter in read.parameters] == [
        *("/empty", "/l1/W", "/l1/b", "/l1/half", "/scale")
    ]


def test_it_is_json_for_people(manifest: Manifest) -> None:
    text = manifest_json.dump(manifest).decode()
    fields = json.loads(text)
    assert list(fields)[:4] == ["format", "version", "step", "t"]
    assert list(fields)[-3:] == ["groups", "files", "checksum"]
    assert fields["hyperparameters"]["lr"] == {"float": "inf"}
    # A column of a group has a line, and so have all ranges of a file.
    assert '\n   "names": ["/empty", "/l1/W", "/l1/b"],\n' in text
    assert '\n   "shapes": [[3, 0], [40, 100], [3]],\n' in text
    assert f'\n   "path": "{fields["files"][0]["path"]}",\n' in text
    assert text.count('"ranges"') == len(fields["files"])


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
        (checkpoints.sealed({**FORMAT, "version": 1}), "'parameters'"),
        (checkpoints.sealed({**FORMAT, "version": 2}), "'loss_scale'"),
        (checkpoints.sealed({**FORMAT, "version": 3}), "version 3 of the .*: update the package"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        manifest_json.load(data, "m")


S = ("files", 0, "ranges", 0)
G = ("groups", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("t",), LEFT_OUT, "missing 1 required positional argument: 't'"),
        (("extra",), 1, "unexpected keyword argument 'extra'"),
        (("files", 0, "host"), LEFT_OUT, "'host'"),
        (G, 3, "must be a mapping"),
        ((*S,), [], "not enough values to unpack"),
        (("files", 0, "block_bytes"), 0, r"has \d+ checksums for"),
        ((*G, "names", 0), "/l1/b", "groups names a parameter twice"),
        (("groups",), TWICE, "groups names a parameter twice"),
        ((*G, "names", 0), 3, "as names of parameters, which cannot be"),
        ((*G, "names", 0), LEFT_OUT, "gives 2 names, 3 shapes and 3 rule_t"),
        ((*G, "shapes"), [], "gives 3 names, 0 shapes and 3 rule_t"),
        ((*G, "rule_t"), TWICE, "gives 3 names, 3 shapes and 4 rule_t"),
        ((*G, "rule_t", 0), -1, "as rule_t of parameters, which cannot be"),
        ((*G, "shapes", 0), [3, True], "as shapes of parameters, which cannot be"),
        ((*G, "hyperparameters"), {"/x": {}}, "has hyperparameters of others than those of /empty"),
        ((*G, "dtype"), "float128", "has 'float128', which is not known, for parameter /empty"),
        ((*G, "states", "g"), "f4", "has 'f4', which is not known, for state g of /empty"),
        ((*G, "shapes", 0), [3, 1], "files has nothing from element 0 of .* on|must come"),
        ((*G, "shapes", 1), [40, 99], "files has 3 elements from|must come"),
        ((*G, "states", "g2"), LEFT_OUT, r"a range of an unknown line in shard-0.*'g2'\)"),
        ((*G, "states", "more"), "float32", "has nothing from element 0 of state more of /l1/W on"),
        (("groups", 1, "master"), None, "a range of an unknown line in shard-0"),
        (("files", 0, "path"), "rank-00000.safetensors", "files names a file twice"),
        (("files",), TWICE, "files names a file twice"),
        (("files", 1, "rank"), 1, "files has two files of kind rank for one rank"),
        (("files", 0, "blocks", 0), LEFT_OUT, r"shard-00000.safetensors has \d+ checksums for"),
        (("files", 0, "size"), 10**15, r"shard-00000.safetensors has \d+ checksums for"),
        ((*S, 1), 3, "a range of an unknown line in shard-0"),
        ((*S, 1), -1, r"as a range in shard-00000.safetensors, which cannot be"),
        ((*S, 2), "momentum", "a range of an unknown line in shard-0"),
        ((*S, 4), 1, "from element 1 of .* on, where a range that starts at element 0 of .* must"),
        ((*S, 5), 0, "files has 0 elements from|where a range that starts at"),
        ((*S, 5), 10**9, "files has 1000000000 elements from element 0 of|must come"),
        ((*S,), LEFT_OUT, "where a range that starts at element 0 of .* must come|has nothing"),
        (("files", 0, "ranges"), TWICE, "has a tensor twice in shard-00000"),
        (("files", 2), LEFT_OUT, "where a range that starts at|has nothing from"),
    ],
)
def test_what_does_not_fit_together_is_named(
    manifest: Manifest, path: tuple[Any, ...], value: Any, message: str
) -> None:
    fields = json.loads(manifest_json.dump(manifest))
    manifest_json.load(checkpoints.sealed(fields), "m")
    checkpoints.change_field(fields, path, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        manifest_json.load(checkpoints.sealed(fields), "m")
    assert caught.value.path == "m"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ()}, "has nothing from element 0 of parameter /l1/W on"),
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
