"""Trainings on MPI ranks that are killed, at whatever moment, and go on as if nothing had been."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trainings
from stages import STAGES
from trainings import job

pytestmark = pytest.mark.mpi

COMMITTED = STAGES.index("after rename")


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """MPI kills the other ranks; it goes on with as many ranks, and with another number."""
    out = tmp_path / "out"
    never, newest = {}, {}
    for size in (1, 2, 3):
        path = tmp_path / str(size)
        # Whether the save of step 6 has come to its end is up to the disk.
        killed = job(path, name="killed", trouble=[7, [size - 1], "kill"])
        first = trainings.run(size, out, {"name": "never"}, killed)
        assert first.status != 0
        first.status = 0
        never[size] = first.facts("never")
        shutil.copytree(path, tmp_path / f"of {size}")
        newest[size] = trainings.whole_steps(path)[-1]
        assert newest[size] in (4, 6)
    for size in (1, 2, 3):
        before = (size + 1) % 3 + 1
        path, other = tmp_path / str(size), tmp_path / f"of {before}"
        outcome = trainings.expect(size, out, job(path), job(other, name="other"))
        assert [values["step"] for values in outcome.reports("start")] == [newest[size]] * size
        assert outcome.facts() == never[size]
        assert outcome.reports("end")[0]["stalled"]
        assert [values["said"] for values in outcome.reports("end")] == [[]] * size
        check_at_another_world_size(outcome, before, size, newest[before])
        for directory in (path, other):
            assert trainings.whole_steps(directory) == [8, 10]
            assert trainings.debris(directory) == set()


def check_at_another_world_size(
    outcome: trainings.Outcome, before: int, after: int, newest: int
) -> None:
    passed = newest * 4 * before / 36
    for values in outcome.reports("start", "other"):
        assert values["step"] == newest
        assert abs(values["position"] - passed) <= after / 36
    words = f"the checkpoint is of {before} ranks, and there are {after} now"
    for values in outcome.reports("end", "other"):
        assert (values["iteration"], values["t"]) == (10, 9)
        assert len(values["said"]) == (values["rank"] == 0)
    assert outcome.reports("end", "other")[0]["said"][0].startswith(words)
    facts = outcome.facts("other")
    assert len({values["parameters"] for values in facts}) == 1
    assert [entry["iteration"] for entry in facts[0]["log"]] == [3, 6, 9]


@pytest.mark.parametrize("rank", [0, 1])
def test_whenever_a_save_is_killed_the_training_goes_on(tmp_path: Path, rank: int) -> None:
    """One training after the other dies, each in its first save; the last one ends well."""
    path, out = tmp_path / "d", tmp_path / "out"
    steps = [2, 4]
    jobs, after = [job(path, until=4)], {}
    for stage in STAGES:
        if stage.startswith("replaced") or (rank == 1 and " file " not in stage):
            continue
        name = f"{stage}:{rank}"
        jobs.append(job(path, until=30, dies=name, keep=str(tmp_path / name), name=name))
        start = steps[-1]
        if STAGES.index(stage) >= COMMITTED:
            steps = [*steps, steps[-1] + 2]
        if stage == "after retention":
            steps = steps[-2:]
        elif STAGES.index(stage) >= STAGES.index("old step set aside"):
            steps = [*steps[:-3], *steps[-2:]]
        after[name] = start, steps
    until = steps[-1] + 3
    jobs += [{"name": "never", "until": until}, job(path, name="ends", until=until)]
    outcome = trainings.fork(2, out, *jobs)
    left: set[str] = set()
    for name, (start, expected) in after.items():
        assert [values["step"] for values in outcome.reports("start", name)] == [start] * 2, name
        assert outcome.reports("end", name) == []
        assert trainings.whole_steps(tmp_path / name) == expected, name
        # What the one before has left is gone.
        debris = trainings.debris(tmp_path / name)
        assert not left & debris, name
        stage = name.split(":")[0]
        goes_on = STAGES.index(stage) < COMMITTED or stage == "old step set aside"
        assert bool(debris) == goes_on, name
        left = debris
    assert [values["step"] for values in outcome.reports("start", "ends")] == [steps[-1]] * 2
    assert outcome.facts("ends") == outcome.facts("never")
    assert trainings.whole_steps(path) == [steps[-1], steps[-1] + 2]
    assert trainings.debris(path) == set()
