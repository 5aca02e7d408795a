"""The file of events: whole lines, whatever happens to it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from smorms3_dist.launch.events import EventLog, versions

import pytest


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_with_their_time_and_attempt(tmp_path: Path) -> None:
    path = tmp_path / "events"
    before = time.time()
    for attempt in (0, 1):
        events = EventLog(path)
        events.attempt = attempt
        events.note("restart", ranks=2, hosts=None)
        events.close()
        events.note("end")
    first, second = read(path)
    assert before <= first.pop("time") <= second.pop("time") <= time.time()
    assert first == {"event": "restart", "attempt": 0, "ranks": 2, "hosts": None}
    assert second["attempt"] == 1


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ('{"time": 1, "ev', ""),
        ('{"time": 1, "event": "end"}\n{"time": 1, "ev', '{"time": 1, "event": "end"}\n'),
        ("what is this", "what is this\n"),
    ],
)
def test_what_a_crash_has_left_of_a_line_is_removed_and_nothing_else(
    before: str, kept: str, tmp_path: Path
) -> None:
    path = tmp_path / "events"
    path.write_text(before)
    events = EventLog(path)
    events.note("end")
    text = path.read_text()
    assert text.startswith(kept)
    assert json.loads(text.removeprefix(kept))["event"] == "end"


def test_no_piece_of_a_line_stays_where_a_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    path = tmp_path / "events"
    events = EventLog(path, said.append)
    events.note("start")
    before = path.read_bytes()
    write, calls = os.write, []

    def write_little(file: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(file, data[:7])

    monkeypatch.setattr(os, "write", write_little)
    events.note("first_step")
    events.note("end")
    assert path.read_bytes() == before
    assert said == [f"--events {path}: No space left on device; nothing more is noted there"]


def test_a_file_that_cannot_be_made_is_an_error_and_none_notes_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        EventLog(tmp_path / "nowhere" / "events")
    EventLog().note("start")
    # What is no file on a disk will do.
    EventLog(Path("/dev/null")).note("start")
    assert {"smorms3_dist", "python", "chainer", "numpy", "mpi4py"} <= versions().keys()
