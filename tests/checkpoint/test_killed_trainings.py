"""Trainings on MPI ranks that are killed, at whatever moment, and go on as if nothing had been."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files import stages

import pytest
import trainings

pytestmark = pytest.mark.mpi

COMMITTED = stages.STAGES.index("after rename")
REPLACING = ["replaced step set aside", "replaced step removed"]


def job(path: Path, **options: Any) -> dict[str, Any]:
    return {"directories": [str(path)], **options}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path, world_size: int) -> None:
    path, out = tmp_path / "d", tmp_path / "out"
    # Whether the save of step 6 has come to its end is up to the disk.
    killed = job(path, name="killed", trouble=[7, [world_size - 1], "kill"])
    first = trainings.run(world_size, out, {"name": "never"}, killed)
    assert first.status != 0
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    newest = trainings.whole_steps(path)[-1]
    assert newest in (4, 6)

    again = trainings.expect(world_size, out, job(path))
    assert [values["step"] for values in again.reports("start")] == [newest] * world_size
    first.status = 0
    assert again.facts() == first.facts("never")
    assert again.reports("end")[0]["stalled"]
    assert [values["said"] for values in again.reports("end")] == [[]] * world_size
    assert trainings.whole_steps(path) == [8, 10]
    assert trainings.debris(path) == set()

    check_at_another_world_size(copy, out, world_size, newest)


def check_at_another_world_size(path: Path, out: Path, before: int, newest: int) -> None:
    after = before % 3 + 1
    other = trainings.expect(after, out, job(path))
    assert [values["step"] for values in other.reports("start")] == [newest] * after
    passed = newest * 4 * before / 36
    for values in other.reports("start"):
        assert abs(values["position"] - passed) <= after / 36
    words = f"the checkpoint is of {before} ranks, and there are {after} now"
    for values in other.reports("end"):
        assert values["iteration"] == 10
        assert values["t"] == 9
        assert len(values["said"]) == (values["rank"] == 0)
    assert other.reports("end")[0]["said"][0].startswith(words)
    assert len({values["parameters"] for values in other.facts()}) == 1
    log = other.facts()[0]["log"]
    assert [entry["iteration"] for entry in log] == [3, 6, 9]
    assert trainings.whole_steps(path) == [8, 10]


def kill_in_turn(path: Path, out: Path, places: list[str]) -> None:
    """Lets one training after the other die, each in its first save, and the last one end."""
    trainings.expect(2, out, job(path, until=4))
    steps = [2, 4]
    left: set[str] = set()
    for place in places:
        stage = place.split(":")[0]
        died = trainings.run(2, out, job(path, until=30), SMORMS3_DIE_AT=place)
        assert died.status != 0, (place, died.output)
        assert died.reports("end") == []
        assert [values["step"] for values in died.reports("start")] == [steps[-1]] * 2, place
        reached = stages.STAGES.index(stage)
        if reached >= COMMITTED:
            steps.append(steps[-1] + 2)
        if reached >= stages.STAGES.index("after retention"):
            steps = steps[-2:]
        elif reached >= stages.STAGES.index("old step set aside"):
            del steps[-3]
        assert trainings.whole_steps(path) == steps, place
        # What the one before has left is gone.
        assert not left & trainings.debris(path), place
        left = trainings.debris(path)
        assert bool(left) == (reached < COMMITTED or stage == "old step set aside"), place
    until = steps[-1] + 3
    ended = trainings.expect(2, out, {"name": "never", "until": until}, job(path, until=until))
    assert [values["step"] for values in ended.reports("start")] == [steps[-1]] * 2
    assert ended.facts() == ended.facts("never")
    assert trainings.whole_steps(path) == [steps[-1], steps[-1] + 2]
    assert trainings.debris(path) == set()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_whenever_a_save_is_killed_the_training_goes_on(tmp_path: Path, rank: int) -> None:
    places = [
        f"{stage}:{rank}"
        for stage in stages.STAGES
        if stage not in REPLACING and (rank == 0 or " file " in stage)
    ]
    kill_in_turn(tmp_path / "d", tmp_path / "out", places)


@pytest.mark.slow
@pytest.mark.parametrize("stage", REPLACING)
def test_whenever_a_replacement_is_killed_the_training_goes_on(tmp_path: Path, stage: str) -> None:
    path, out = tmp_path / "d", tmp_path / "out"
    trainings.expect(2, out, job(path, until=4))
    # Starts from the beginning, and comes to step 2 once more.
    died = trainings.run(2, out, job(path, load=False), SMORMS3_DIE_AT=stage)
    assert died.status != 0
    assert trainings.whole_steps(path) == [2, 4]
    assert len(trainings.debris(path)) == (2 if stage == REPLACING[0] else 0)
    ended = trainings.expect(2, out, {"name": "never"}, job(path))
    assert [values["step"] for values in ended.reports("start")] == [4, 4]
    assert ended.facts() == ended.facts("never")
    assert trainings.whole_steps(path) == [8, 10]
    assert trainings.debris(path) == set()
