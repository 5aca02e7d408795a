"""Timelines: what is in them, on one clock, whatever has become of the ranks that wrote them."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.timeline import draw
from smorms3_dist import save_checkpoint
from smorms3_dist.collectives.clocks import offset_to_rank_zero
from smorms3_dist.phases import Phase, Phases
from smorms3_dist.timeline import commands
from smorms3_dist.timeline.merging import LAUNCHER, NoTimelineError, merge
from smorms3_dist.timeline.rank_timeline import RankTimeline, start_timeline
from smorms3_dist.timeline.trace_file import TraceFile, before, read_events

import fastjsonschema
import models
import process
import pytest
from rank_threads import ThreadCollectives, run_ranks

SCHEMA = Path(__file__).resolve().parents[1] / "schemas/timeline.json"
EVENT = '{"name": "%s", "ph": "i", "pid": 0, "tid": 0, "ts": %d}'


def names(path: Path) -> list[str]:
    return [event["name"] for event in read_events(path)]


def write(path: Path, lines: Sequence[str], goes_on: bool = False) -> None:
    file = TraceFile(path, goes_on)
    file.write(lines)
    file.close()


# The file


def test_a_file_is_whole_json_after_each_write(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.json"
    file = TraceFile(path)
    assert json.loads(path.read_text()) == []
    for number in range(3):
        file.write([EVENT % ("a", number), EVENT % ("b", number)])
        file.write([])
        assert len(json.loads(path.read_text())) == 2 * number + 2
    file.close()
    assert names(path) == ["a", "b"] * 3


@pytest.mark.parametrize("cut", [1, 3, 5, 30])
def test_what_a_crash_has_torn_is_left_out(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "rank-0.json"
    write(path, [EVENT % (name, 1) for name in "abc"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert names(path) == (["a", "b", "c"] if cut <= 3 else ["a", "b"])
    # The next attempt goes on from there.
    write(path, [EVENT % ("d", 1)], goes_on=True)
    assert [event["name"] for event in json.loads(path.read_text())] == names(path)
    assert names(path)[-1] == "d"


def test_a_large_file_keeps_the_last_events_and_a_new_job_none(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.json"
    file = TraceFile(path, largest=200)
    for number in range(20):
        file.write([EVENT % (number, number)])
        if file.is_full:
            file.begin_another()
    file.close()
    kept = [int(name) for name in names(path)]
    assert 3 < len(kept) < 20 and kept == list(range(kept[0], 20))
    assert path.stat().st_size + before(path).stat().st_size < 3 * 200
    write(path, [])
    assert names(path) == []


# A rank


def test_a_killed_process_leaves_what_it_has_written(tmp_path: Path) -> None:
    """And the next attempt of the rank adds to it."""
    code = f"""
import os, pathlib, signal, sys
from smorms3_dist.phases import Phase, Phases
from smorms3_dist.timeline.rank_timeline import RankTimeline
phases = Phases()
timeline = RankTimeline(pathlib.Path({str(tmp_path)!r}), 3, phases, int(sys.argv[1]))
with phases.during(Phase.REDUCE):
    phases.end_step(1)
timeline.flush()
assert not {{"numpy", "chainer"}} & sys.modules.keys()
os.kill(os.getpid(), signal.SIGKILL)
"""
    for attempt in ("0", "1"):
        status, output = process.run(sys.executable, "-c", code, attempt, limit=60)
        assert status == -signal.SIGKILL, output
    events = json.loads((tmp_path / "rank-3.json").read_text())
    assert [event["name"] for event in events].count("step 1") == 2
    merged = merge(tmp_path)
    assert merged.ranks == [3] and merged.uncertainty is None
    assert [e["args"] for e in merged.events if e["name"] == "restart"] == [{"detail": "attempt 1"}]


def test_a_full_disk_ends_the_timeline_and_not_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = Phases()
    timeline = RankTimeline(tmp_path, 0, phases)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceFile, "write", fail)
    for _ in range(3):
        phases.happened("stall")
        timeline.flush()
    timeline.close()
    said = f"rank 0 writes no timeline any more: {timeline.path}: No space left on device\n"
    assert capsys.readouterr().err == f"smorms3_dist: {said}"


def test_a_directory_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMORMS3_TIMELINE", str(tmp_path / "file"))
    phases = Phases()
    with pytest.raises(ValueError, match=r"SMORMS3_TIMELINE=.*file: rank 2 cannot write its time"):
        start_timeline(phases, 2)
    assert not phases.on and phases.timeline is None


# Clocks


def test_the_difference_of_clocks_is_within_what_is_said_of_it() -> None:
    ahead = [0.0, 1234.5, -77.25, 1e-3]

    def run(comm: ThreadCollectives) -> tuple[float, float]:
        rng = random.Random(comm.rank)

        def now() -> float:
            # Whoever looks at a clock may be held up.
            time.sleep(rng.random() * 1e-3)
            return time.perf_counter() + ahead[comm.rank]

        return offset_to_rank_zero(comm, now)

    for rank, (offset, uncertainty) in enumerate(run_ranks(4, run)):
        assert abs(offset - ahead[rank]) <= uncertainty or rank == 0 == offset


def test_the_quickest_round_counts() -> None:
    """Rank 1, 100 s ahead: the exchange takes 10 s each time, but 1 s in one round."""
    takes = [1 if number == 5 else 10 for number in range(99)]
    first: list[tuple[float, float]] = []

    def exchange(value: Any) -> list[Any]:
        if value is not None:
            return [first, value]
        begun = clock.now
        clock.now += takes[len(first)]
        first.append((begun, clock.now))
        return [None, None]

    clock = SimpleNamespace(now=0)
    comm: Any = SimpleNamespace(rank=1, all_gather_object=exchange)
    assert offset_to_rank_zero(comm, lambda: clock.now + 100) == (100, 1)


# All ranks


class Ahead(RankTimeline):
    """A timeline of a rank whose clock is an hour ahead for each rank before it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_unix":
            value += 3600 * self._rank
        super().__setattr__(name, value)


def test_a_training_is_merged_on_one_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, steps = tmp_path / "seen", 4
    seen.mkdir()
    told: list[dict[str, Any]] = [
        # A job before.
        {"time": 1.0, "event": "start"},
        {"time": 2.0, "event": "end"},
        {"time": time.time(), "event": "start", "ranks": 3},
    ]

    def body(optimizer: Any, rank: int) -> None:
        timeline = Ahead(seen, rank, optimizer.phases)
        optimizer.update()
        models.train(optimizer, rank, range(1, steps))
        saver = save_checkpoint(tmp_path / "ck", optimizer, asynchronous=True)
        saver.wait()
        optimizer.phases.happened("stall", "update 4")
        timeline.close()

    models.on_ranks(3, body)
    told.append({"time": time.time(), "event": "end", "status": 0})
    lines = [json.dumps(event) for event in told]
    (seen / "events.jsonl").write_text("\n".join([*lines, '{"time": 1']))
    assert commands.main([str(seen)], "timeline") == 0
    output = capsys.readouterr()
    assert f"{seen / 'timeline.json'}: ranks 0-2, " in output.out
    assert "clocks are aligned to " in output.out and "perfetto" in output.out
    assert output.err == "1 lines of the launcher's events are none\n"
    draw(json.loads((seen / "timeline.json").read_text()), seen / "picture.png", 1, steps - 1)
    assert (seen / "picture.png").read_bytes().startswith(b"\x89PNG")

    merged = json.loads((seen / "timeline.json").read_text())
    fastjsonschema.compile(json.loads(SCHEMA.read_text()))(merged)
    assert merged["otherData"]["ranks"] == [0, 1, 2]
    events = merged["traceEvents"]
    launcher = [event["name"] for event in events if event["pid"] == LAUNCHER and "s" in event]
    assert launcher == ["start", "end"]
    # An hour apart, and yet within the few seconds that it took.
    start, end = (event["ts"] for event in events if event["pid"] == LAUNCHER and "s" in event)
    slack = 1e6 * merged["otherData"]["clock_uncertainty_s"] + 1e3
    steps_of = []
    for rank in range(3):
        mine = [event for event in events if event["pid"] == rank]
        assert all(start - slack <= event["ts"] <= end + slack for event in mine)
        (named,) = (e["args"]["name"] for e in mine if e["name"] == "process_name")
        assert named.startswith(f"rank {rank} on ")
        phases = [event for event in mine if event.get("cat") == "phase"]
        assert {phase["name"] for phase in phases} == {p.key for p in Phase} - {"hooks"}
        # One after the other, without a gap, and a step around those that it has.
        for one, after in itertools.pairwise(phases):
            assert one["ts"] + one["dur"] == after["ts"]
        spans = [event for event in mine if event.get("cat") == "step"]
        assert [span["name"] for span in spans] == [f"step {t}" for t in range(steps)]
        ends_of_phases = {phase["ts"] + phase["dur"] for phase in phases}
        assert {span["ts"] + span["dur"] for span in spans} <= ends_of_phases
        beside = {event["name"] for event in mine if event.get("cat") == "checkpoint"}
        written = {"checkpoint copy", "checkpoint write"}
        assert beside == (written | {"checkpoint commit"} if rank == 0 else written)
        (stall,) = (event for event in mine if event["name"] == "stall")
        assert stall["args"] == {"detail": "update 4"}
        steps_of.append(spans)
    # No rank ends a step before all have begun it.
    for same in zip(*steps_of, strict=True):
        assert max(e["ts"] for e in same) <= min(e["ts"] + e["dur"] for e in same) + slack


def test_ranks_of_an_earlier_job_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (2, 0):
        timeline = RankTimeline(tmp_path, rank, Phases())
        timeline.close()
    nowhere = tmp_path / "nowhere" / "all.json"
    assert commands.main([str(tmp_path), "--output", str(nowhere)], "timeline") == 1
    wrong = f"timeline: error: {nowhere} cannot be written: No such file or directory\n"
    assert capsys.readouterr().err == wrong
    assert commands.main([str(tmp_path), "--output", str(tmp_path / "all.json")], "timeline") == 0
    assert capsys.readouterr().err == "rank 2: of an earlier job, left out\n"
    assert json.loads((tmp_path / "all.json").read_text())["otherData"]["ranks"] == [0]


def test_a_directory_without_timelines_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank-x.json").touch()
    (tmp_path / "rank-0.json").touch()
    with pytest.raises(NoTimelineError, match="has no timeline of any rank"):
        merge(tmp_path)
    assert commands.main([str(tmp_path)], "timeline") == 1
    assert capsys.readouterr().err.startswith(f"timeline: error: {tmp_path} has no timeline")
    assert os.listdir(tmp_path).count("timeline.json") == 0
