"""StepReader: any range at any world size, from whole files only."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

from smorms3_dist.checkpoint.files import CheckpointDirectory, CheckpointError, StepReader
from smorms3_dist.checkpoint.files.manifest import Array, GroupLine

import checkpoints
import numpy as np
import pytest


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
def test_all_arrays_are_read_as_they_were_saved(tmp_path: Path, world_size: int) -> None:
    model = checkpoints.example()
    gc.collect()  # what other tests have left may be closed at any time
    before = os.listdir("/proc/self/fd")
    with CheckpointDirectory(tmp_path) as directory:
        checkpoints.save(directory, 7, model, world_size)
        with StepReader(directory, 7) as reader:
            # Twice, with most files closed in between.
            for _ in range(2):
                checkpoints.assert_equal(checkpoints.read_all(reader), model)
            assert len(os.listdir("/proc/self/fd")) - len(before) <= 18
    assert os.listdir("/proc/self/fd") == before


def test_any_range_is_read_and_the_whole_in_blocks(tmp_path: Path) -> None:
    array = Array("/l1/W", "state", "g")
    model = checkpoints.example()
    values = model[array].reshape(-1)
    choice = random.Random(0)
    with CheckpointDirectory(tmp_path) as directory:
        checkpoints.save(directory, 7, model, 4)
        with StepReader(directory, 7) as reader:
            line, *_ = reader.manifest.line_of(array)
            assert len(reader.manifest.locations[line]) > 4
            for _ in range(300):
                start, stop = sorted(choice.choices(range(values.size + 1), k=2))
                out = np.zeros(stop - start, "f4")
                reader.read(array, start, stop, out)
                np.testing.assert_array_equal(out, values[start:stop])
            for array, values in model.items():
                blocks = [block.copy() for block in reader.whole(array, 1000)]
                assert {block.size for block in blocks[:-1]} <= {1000}
                joined = np.concatenate([np.empty(0, values.dtype), *blocks])
                np.testing.assert_array_equal(joined, values.reshape(-1))


def test_only_the_files_that_hold_a_range_are_opened(tmp_path: Path) -> None:
    model = checkpoints.tiny()
    with CheckpointDirectory(tmp_path) as directory:
        checkpoints.save(directory, 7, model, 2)
        with StepReader(directory, 7) as reader:
            found = reader.manifest.locations[GroupLine(0, "param", None)]
            first, second = (location.range for location in found)
            os.remove(directory.path_of(7) / "shard-00001.safetensors")
            out = np.empty(first.stop, "f4")
            reader.read(Array("/W", "param", None), 0, first.stop, out)
            np.testing.assert_array_equal(out, model[Array("/W", "param", None)][: first.stop])
            with pytest.raises(
                CheckpointError,
                match=r"step-0000000007/shard-00001.safetensors: cannot be opened "
                r"\(of rank 1 on host node0\): No such file",
            ):
                reader.read(Array("/W", "param", None), 0, second.stop, np.empty(second.stop, "f4"))


def test_wrong_calls_are_told(tmp_path: Path) -> None:
    with CheckpointDirectory(tmp_path) as directory:
        checkpoints.save(directory, 7, checkpoints.tiny())
        with pytest.raises(CheckpointError, match=f"{tmp_path}: has no step 8; it has 7"):
            StepReader(directory, 8)
        with StepReader(directory, 7) as reader:
            for array in [("/V", "param", None), ("/W", "master", None), ("/W", "state", "h")]:
                with pytest.raises(CheckpointError, match=r"has no (parameter|master|state)"):
                    reader.read(Array(*array), 0, 0, np.empty(0, "f4"))
            for start, stop in [(-1, 1), (0, 36), (3, 2)]:
                with pytest.raises(ValueError, match="has 35 elements"):
                    reader.read(Array("/W", "param", None), start, stop, np.empty(2, "f4"))
            with pytest.raises(ValueError, match="cannot be read into an array"):
                reader.read(Array("/W", "param", None), 0, 2, np.empty(2, "f8"))
