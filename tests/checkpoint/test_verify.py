"""verify and diff: what is damaged, and what differs."""

from __future__ import annotations

import os
from pathlib import Path

from smorms3_dist.checkpoint.files import (
    CheckpointDirectory,
    CheckpointError,
    StepReader,
    diff,
    verify,
)
from smorms3_dist.checkpoint.files.manifest import Array, Manifest

import checkpoints
import numpy as np
import pytest

G = Array("/l1/W", "state", "g")
PARAM = Array("/l1/W", "param", None)


def test_problems_name_the_file_its_rank_host_and_bytes(tmp_path: Path) -> None:
    with CheckpointDirectory(tmp_path) as directory:
        path = checkpoints.save(directory, 3, checkpoints.example(), 4)
        shards = [path / f"shard-{rank:05d}.safetensors" for rank in range(4)]
        os.remove(shards[0])
        os.truncate(shards[1], 100)
        for index in (700, 1300, 1301):
            checkpoints.flip(shards[2], index)
        problems = list(verify(directory, 3))
    assert [(p.path, p.rank, p.host) for p in problems] == [
        (str(shards[0]), 0, "node0"),
        (str(shards[1]), 1, "node0"),
        (str(shards[2]), 2, "node1"),
    ]
    assert "No such file" in problems[0].reason
    assert "has 100 bytes, and " in problems[1].reason
    assert (problems[2].start, problems[2].stop) == (512, 768)
    assert str(problems[2]) == (
        f"{shards[2]}: is damaged: wrong checksum of the bytes 512 to 767, the first of 2 damaged "
        "blocks (of rank 2 on host node1)"
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sum", "0 to 447, but not of any block (of rank 0 on host node0)"),
        ("tensor", "in the tensor elsewhere, and has none (of rank 0"),
        ("dtype", " of float16 in the tensor param /W 0:32, and has 32 of float32 (of rank 0"),
    ],
)
def test_what_was_wrong_when_it_was_written_is_a_problem(
    tmp_path: Path, what: str, message: str
) -> None:
    def change(manifest: Manifest) -> Manifest:
        edited = checkpoints.edited
        file, *files = manifest.files
        held, *others = file.ranges
        (group,) = manifest.groups
        if what == "sum":
            file = edited(file, sums=edited(file.sums, xxh3="0" * 16))
        elif what == "tensor":
            file = edited(file, ranges=(held._replace(tensor="elsewhere"), *others))
        else:
            group = edited(group, dtype="float16")
        return edited(manifest, files=(file, *files), groups=(group,))

    with CheckpointDirectory(tmp_path) as directory:
        checkpoints.save(directory, 3, checkpoints.tiny(), 2, change)
        problem, *_ = verify(directory, 3)
        assert message in problem.reason
        with StepReader(directory, 3) as reader:
            if what != "sum":
                with pytest.raises(CheckpointError, match="should have"):
                    checkpoints.read_all(reader)


def test_every_flipped_byte_and_other_length_is_noticed_and_not_given_out(tmp_path: Path) -> None:
    with CheckpointDirectory(tmp_path) as directory:
        path = checkpoints.save(directory, 3, checkpoints.tiny(), 2, block_bytes=64)
        for file in sorted(path.iterdir()):
            data = file.read_bytes()
            # Of manifests, test_manifest.py flips all of them.
            for index in range(0, len(data), 1 if file.suffix == ".safetensors" else 11):
                checkpoints.flip(file, index)
                (problem,) = verify(directory, 3)
                assert problem.path == str(file)
                if file.suffix == ".safetensors":
                    assert problem.start == index // 64 * 64
                if not file.name.startswith("rank"):
                    with (
                        pytest.raises(CheckpointError) as caught,
                        StepReader(directory, 3) as reader,
                    ):
                        checkpoints.read_all(reader)
                    assert caught.value.path == str(file)
                file.write_bytes(data)
            for length in reversed(range(len(data))):
                os.truncate(file, length)
                assert directory.steps() == []
                assert directory.damaged()[3].path == str(file)
            for content in (b"", data + b" "):
                file.write_bytes(content)
                assert directory.damaged()[3].path == str(file)
                (problem,) = verify(directory, 3)
                assert problem.path == str(file)
            file.write_bytes(data)
            assert directory.steps() == [3]
        progress: list[tuple[int, int]] = []
        assert list(verify(directory, 3, lambda *counts: progress.append(counts))) == []
        total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        assert progress[-1] == (total, total)
        assert [done for done, _ in progress] == sorted({done for done, _ in progress})


def differences(
    tmp_path: Path, after: checkpoints.Model, before: checkpoints.Model | None = None
) -> list[str]:
    with CheckpointDirectory(tmp_path) as directory:
        checkpoints.save(directory, 1, before or checkpoints.example(), 2)
        checkpoints.save(directory, 2, after, 3)
        with StepReader(directory, 1) as first, StepReader(directory, 2) as second:
            return [str(difference) for difference in diff(first, second)]


def test_differing_elements_are_counted(tmp_path: Path) -> None:
    after = checkpoints.example()
    after[PARAM].reshape(-1)[[3, 3999]] += [1, -2]
    after[G].reshape(-1)[5] = np.nan
    after[Array("/l1/half", "param", None)][2] = np.inf
    before = checkpoints.example()
    for model in (before, after):
        # No numbers on both sides are equal.
        model[Array("/scale", "state", "g")][...] = np.nan
        model[Array("/l1/b", "param", None)][:2] = [np.inf, -np.inf]
    # They are of different world sizes.
    assert differences(tmp_path, after, before) == [
        "parameter /l1/W: changed, 2 elements by up to 2",
        "state g of /l1/W: changed, 1 element by up to inf",
        "parameter /l1/half: changed, 1 element by up to inf",
    ]


def test_arrays_come_go_and_change_their_form(tmp_path: Path) -> None:
    after = checkpoints.example()
    del after[G]
    after[Array("/l1/W", "state", "h")] = np.zeros((40, 100), "f8")
    for array in [array for array in after if array.parameter == "/l1/b"]:
        after[array] = np.zeros((3, 1), "f4")
    scale = Array("/scale", "param", None)
    after[scale] = np.array(after[scale] + 0.5).astype("f4")
    after[Array("/empty", "state", "mem")] = np.zeros((3, 0), "f8")
    assert differences(tmp_path, after) == [
        "state mem of /empty: retyped, float32 (3, 0) -> float64 (3, 0)",
        "state g of /l1/W: removed, float32 (40, 100) -> absent",
        "state h of /l1/W: added, absent -> float64 (40, 100)",
        "parameter /l1/b: reshaped, float32 (3,) -> float32 (3, 1)",
        "state g of /l1/b: reshaped, float32 (3,) -> float32 (3, 1)",
        "state g2 of /l1/b: reshaped, float32 (3,) -> float32 (3, 1)",
        "state mem of /l1/b: reshaped, float32 (3,) -> float32 (3, 1)",
        "parameter /scale: retyped, float64 () -> float32 (), 1 element by up to 0.5",
    ]
