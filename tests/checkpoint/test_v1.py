"""A step that the first version has saved, on two ranks: it is loaded, for good.

It was saved by version 0.1.0, before the package had its rooms. `expected.npz` is what it holds.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from smorms3_dist import load_checkpoint
from smorms3_dist.checkpoint.files import (
    CheckpointDirectory,
    CheckpointError,
    manifest_json,
    verify,
)

import checkpoints
import models
import numpy as np
import pytest
from checkpoints import LEFT_OUT
from rank_threads import ThreadCollectives, run_ranks
from resuming import dynamic, facts, make

SAVED = Path(__file__).with_name("v1")
SHAPES = {"a": (3, 5), "c": (700,)}

make_model = functools.partial(models.Model, SHAPES, {"a": "float16"})


class Kept:
    """What each rank has kept besides."""

    def __init__(self) -> None:
        self.seen = np.zeros(4)
        self.text: Any = None

    def serialize(self, serializer: Any) -> None:
        self.seen = serializer("seen", self.seen)
        self.text = serializer("text", self.text)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_of_the_first_version_is_loaded(world_size: int) -> None:
    def load(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, dynamic, make_model, seed=9)
        kept = Kept()
        load_checkpoint(SAVED, optimizer, objects={"mine": kept})
        assert kept.seen.tolist() == [0, 1, 2, 3]
        assert str(kept.text) == "nothing is pickled"
        return optimizer

    loaded = run_ranks(world_size, load)
    states = models.gathered_states(loaded)
    with np.load(SAVED / "expected.npz") as expected:
        assert len(expected) == 2 + 4 + 3
        for optimizer in loaded:
            assert facts(optimizer) == (3, 1, {"/a": 3, "/c": 3}, 8.0)
            for name, array in models.arrays(optimizer.target).items():
                assert array.tobytes() == expected[f"param{name}"].tobytes()
        for name, arrays in states.items():
            for state, values in arrays.items():
                assert values.tobytes() == expected[f"{state}{name}"].tobytes()


def test_its_manifest_says_the_same_in_the_present_version() -> None:
    directory = CheckpointDirectory(SAVED)
    assert list(verify(directory, 3)) == []
    manifest = directory.manifest(3)
    data = manifest_json.dump(manifest)
    assert json.loads(data)["version"] == manifest_json.VERSION > 1
    assert manifest_json.load(data, "m") == manifest
    a, c = manifest.parameters
    assert (a.name, a.shape, a.dtype, a.master) == ("/a", (3, 5), "float16", "float32")
    assert (c.name, c.shape, c.dtype, c.master) == ("/c", (700,), "float32", None)
    assert a.rule_t == c.rule_t == 3


S = ("files", 0, "segments", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("parameters", 0, "states"), LEFT_OUT, "'states'"),
        (("parameters", 0, "rule_t"), LEFT_OUT, "'rule_t'"),
        (("parameters", 0), 3, "not as it should be"),
        (("parameters", 0, "name"), "/c", "names a parameter twice|'/a'"),
        (("parameters", 0, "name"), "/other", "not as it should be: '/a'"),
        (("parameters", 0, "shape"), [3, 6], "where a range that starts at|has nothing from"),
        (("parameters", 0, "master"), None, "a range of an unknown line in shard-0"),
        (("files", 0, "segments"), LEFT_OUT, "'segments'"),
        ((*S,), [], "missing 6 required"),
        ((*S,), LEFT_OUT, "where a range that starts at|has nothing from"),
        ((*S, 1), "momentum", "a range of an unknown line in shard-0"),
        ((*S, 3), "/none", "'/none'"),
        ((*S, 4), 1, "must come|has nothing from"),
        ((*S, 4), "x", "not as it should be"),
        ((*S, 5), 0, "files has elements 0 to 0 of the 15 of /a|elements 0 to 0 of the 700 of /c"),
        ((*S, 5), 10**9, "files has elements 0 to 1000000000 of the"),
    ],
)
def test_what_does_not_fit_together_in_it_is_named(
    path: tuple[Any, ...], value: Any, message: str
) -> None:
    file = CheckpointDirectory(SAVED).path_of(3) / manifest_json.NAME
    fields = json.loads(file.read_bytes())
    checkpoints.change_field(fields, path, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        manifest_json.load(checkpoints.sealed(fields), "m")
    assert caught.value.path == "m"
    assert len(str(caught.value)) < 500
