"""What is read of results, and what is picked out of it to be drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from smorms3_dist import cli
from smorms3_dist.plot import series
from smorms3_dist.plot.records import Events, Log, Prediction, RecordError, read

import pytest

ROWS = [{"iteration": 5, "main/loss": 2.0}, {"iteration": 10, "main/loss": 1.0}]
EVENTS = [{"time": 10.5, "event": "start"}, {"time": 12, "event": "end", "status": 0}]


def lines(*events: Any) -> str:
    return "".join(f"{json.dumps(event)}\n" for event in events)


def test_files_are_known_by_what_is_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log").write_text(json.dumps(ROWS))
    (run / "events.jsonl").write_text(lines(*reversed(EVENTS)))
    assert cli.main(["plan", "--params", "100", "-n", "2", "--transport", "host", "--json"]) == 0
    printed = capsys.readouterr().out
    (run / "plan.json").write_text(printed)
    # What else lies there is not looked at, or passed over.
    (run / "settings.json").write_text('{"lr": 1}')
    (run / "list.json").write_text("[]")
    (run / "snapshot_iter_5").write_bytes(b"\xff\xfe")
    found = read([run])
    assert found.logs == [Log("run", ROWS)]
    assert found.events == [Events("run", EVENTS)]
    (plan,) = found.plans
    assert (plan.name, plan.on_host) == ("run", True)
    assert plan.memory == json.loads(printed)["memory"] and plan.memory["states"] > 0
    # Of several with the same name, the whole path tells.
    (tmp_path / "other" / "run").mkdir(parents=True)
    (tmp_path / "other" / "run" / "log").write_text(json.dumps(ROWS))
    both = [run, tmp_path / "other" / "run", run]
    assert [log.name for log in read(both).logs] == [str(path) for path in both[:2]]
    # By themselves they are found as well; a job that runs is writing a line.
    (run / "events.jsonl").write_text(lines(*EVENTS) + '{"time": 13, "ev')
    files = [run / "plan.json", run / "events.jsonl", run / "log"]
    again = read(files)
    assert again.logs == [Log(str(run / "log"), ROWS)]
    assert again.events == [Events(str(run / "events.jsonl"), EVENTS)]
    assert again.plans == [Prediction(str(run / "plan.json"), plan.memory, True)]
    (run / "one.jsonl").write_text(lines(EVENTS[0]))
    assert read([run / "one.jsonl"]).events[0].events == EVENTS[:1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "[1, 2]",
        '[{"loss": 1}]',
        "no json\n",
        lines(EVENTS[0]) + "no json\n" + lines(EVENTS[1]),
        lines(EVENTS[0], {"time": "x", "event": "end"}),
        lines(EVENTS[0], [1]),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=r"x\.json is neither a log of LogReport, nor events of"):
        read([path])
    with pytest.raises(RecordError, match="has no log of LogReport, no events and no plan"):
        read([tmp_path])
    with pytest.raises(RecordError, match="nowhere cannot be read: No such file"):
        read([tmp_path / "nowhere"])
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(RecordError, match="cannot be read: is no text"):
        read([path])


def test_series_are_numbers_in_ascending_iterations() -> None:
    rows: list[dict[str, Any]] = [
        {"iteration": 1, "main/loss": 3, "main/accuracy": 0.5, "lr": 1, "smorms3/loss": 7},
        {"iteration": 2, "main/loss": math.inf, "validation/main/loss": 4.0},
        {"iteration": 2, "main/loss": 9.0},
        {"iteration": 4, "main/loss": None, "validation/main/loss": True},
        {"iteration": 6, "main/loss": 2.5},
    ]
    log = Log("run", rows)
    (main, validation) = series.named(log, "loss")
    assert main[:2] == ("main/loss", [1, 2, 6])
    assert main.values[::2] == [3.0, 2.5] and math.isnan(main.values[1])
    assert validation == ("validation/main/loss", [2], [4.0])
    assert series.named(log, "accuracy") == [("main/accuracy", [1], [0.5])]
    assert series.named(log, "perplexity") == []
    by_number = series.series_of(Log("run", [{"epoch": 3, "loss": 1.0}] * 2), "loss")
    assert by_number.iterations == [1, 2]


def test_phases_are_those_that_take_time_in_the_order_of_a_step() -> None:
    first = {"update_s": 1.0, "compute_s": 2.0, "hooks_s": 0.0, "step_s": 4.0, "zeta_s": 1.0}
    second = {
        "update_s": 1.5,
        "compute_s": 2.5,
        "layout_s": 0.5,
        "step_s": 4.5,
        "sent_gb_per_s": 9.0,
    }
    rows = [
        {"iteration": 1, "main/loss": 1},
        {"iteration": 2, **{f"smorms3/{k}": v for k, v in first.items()}},
        {"iteration": 4, **{f"smorms3/{k}": v for k, v in second.items()}},
    ]
    assert series.phases(Log("run", rows)) == [
        ("smorms3/compute_s", [2, 4], [2.0, 2.5]),
        ("smorms3/layout_s", [2, 4], [0.0, 0.5]),
        ("smorms3/update_s", [2, 4], [1.0, 1.5]),
        ("smorms3/zeta_s", [2, 4], [1.0, 0.0]),
    ]
    assert series.phases(Log("run", rows[:1])) == []


def test_the_keys_are_those_of_step_report() -> None:
    numbers = pytest.importorskip("smorms3_dist.report.numbers")
    assert numbers.PREFIX == series.PREFIX
    assert tuple(f"{phase}_s" for phase in series.PHASES) == numbers.PHASE_KEYS
    assert {"step_s", "state_bytes", "rss_bytes", "gpu_bytes"} <= numbers.KEYS.keys()
    assert (numbers.IMBALANCE, numbers.SLOWEST) == ("imbalance", "slowest_rank")


def test_memory_is_that_of_the_last_report_by_rank_or_of_all() -> None:
    rows: list[dict[str, Any]] = [
        {"smorms3/rank0/rss_bytes": 1},
        {"smorms3/rank10/rss_bytes": 4, "smorms3/rank9/rss_bytes": 3, "smorms3/rss_bytes": 4},
        {"smorms3/gpu_bytes": 8},
        {},
    ]
    log = Log("run", rows)
    assert list(series.by_rank(log, "rss_bytes").items()) == [("9", 3.0), ("10", 4.0)]
    assert series.by_rank(log, "gpu_bytes") == {"most": 8.0}
    assert series.by_rank(log, "state_bytes") == {}


def test_a_job_is_started_and_started_again() -> None:
    kinds = [
        *(("start", 5), ("first_step", 6), ("checkpoint", 9), ("failure", 10), ("stderr", 11)),
        *(("restart", 12), ("start", 12.5), ("first step", 13), ("stall", 20)),
    ]
    events = Events("run", [{"event": kind, "time": time} for kind, time in kinds])
    first, second = series.attempts(events)
    assert first[:2] == (0, 5) and second[:2] == (7, 15)
    assert first.marks[1] == ("first step", 1)
    assert [kind for kind, _ in second.marks] == ["restart", "start", "first step", "stall"]
    # It is started again after a pause, and events go on in the same file.
    pause: list[dict[str, Any]] = [{"event": "restart", "time": 10, "pause": 5.0}]
    end = [{"event": "end", "time": 12}, {"event": "start", "time": 30}]
    begun, again = series.attempts(Events("run", [*pause, *end]))
    assert begun[:2] == (5, 5) and again[:2] == (20, 20)
    # Of events whose beginning is lost.
    (only,) = series.attempts(Events("run", events.events[2:4]))
    assert only == (0, 1, [("checkpoint", 0), ("failure", 1)])
