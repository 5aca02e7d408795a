"""A step that the first version has saved, on two ranks: it is loaded, and written alike, for good.

It was saved by version 0.1.0, before the package had its rooms. `expected.npz` is what it holds.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from smorms3_dist import load_checkpoint
from smorms3_dist.checkpoint.files import CheckpointDirectory, manifest_json, verify

import models
import numpy as np
import pytest
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


def test_its_manifest_is_written_as_it_was() -> None:
    directory = CheckpointDirectory(SAVED)
    assert list(verify(directory, 3)) == []
    data = (directory.path_of(3) / manifest_json.NAME).read_bytes()
    assert manifest_json.dump(directory.manifest(3)) == data
