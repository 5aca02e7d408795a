"""The cases of the benchmark, running them, and the tables of what they have told."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from smorms3_dist import cli
from smorms3_dist.bench import commands, suite
from smorms3_dist.bench.conditions import Load
from smorms3_dist.bench.suite import Case, Settings
from smorms3_dist.bench.summary import PARTS, Row, Spread, against, in_words, rows, text

import pytest
import recorded

SETTINGS = Settings(quick=True, rounds=2)

TELLS = """
import json, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seconds = {"step": [1.23456789, int(words["--ranks"])]}
versions = {"Python": "3", "steps": words["--steps"]}
json.dump({"seconds": seconds, "versions": versions}, open(words["--result"], "w"))
"""


def alone(program: str) -> Case:
    return Case("step", "a name", "smorms3_dist", 1, program, starter=(sys.executable,))


def test_each_case_is_there_once_and_belongs_to_a_part() -> None:
    known = list(suite.cases())
    keys = [(case.part, case.name, case.system, case.ranks, case.quick) for case in known]
    assert max(Counter(keys).values()) == 1
    assert {case.part for case in known} == set(PARTS)


def test_each_part_has_something_for_the_impatient() -> None:
    assert {case.part for case in suite.cases() if case.quick} == set(PARTS)


def test_results_are_kept_with_four_digits_and_versions_by_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tells.py").write_text(TELLS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said: list[str] = []
    result = suite.run([alone("tells")], SETTINGS, said.append)
    assert [run["seconds"]["step"] for run in result["runs"]] == [[1.235, 1]] * 2
    assert [run["round"] for run in result["runs"]] == [0, 1]
    assert result["versions"] == {"smorms3_dist": {"Python": "3", "steps": "5"}}
    assert len(said) == 2 and said[0].startswith("step: a name, smorms3_dist, 1 rank: step 1.12 s")
    assert json.loads(json.dumps(result)) == result


def test_a_case_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit('no such luck')")
    (tmp_path / "tells.py").write_text(TELLS)
    settings = Settings(quick=True, rounds=1, folder=tmp_path)
    result = suite.run([alone("fails"), alone("tells")], settings, lambda _: None)
    (failed,) = result["failed"]
    assert failed["what"] == "step: a name, smorms3_dist, 1 rank"
    assert "failed (1)" in failed["why"] and "no such luck" in failed["why"]
    assert len(result["runs"]) == 1
    assert "FAILED: step: a name" in text(result)


def test_a_case_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waits.py").write_text("import time\ntime.sleep(3600)")
    monkeypatch.setattr("smorms3_dist.bench.processes_of_cases.LIMIT_S", 1)
    settings = Settings(quick=True, rounds=1, folder=tmp_path)
    result = suite.run([alone("waits")], settings, lambda _: None)
    assert "took more than 1 s" in result["failed"][0]["why"]


def test_makers_work_in_the_same_folder_before(tmp_path: Path) -> None:
    (tmp_path / "makes.py").write_text(
        "import sys, pathlib, json\n"
        "words = dict(zip(sys.argv[1:], sys.argv[2:]))\n"
        "path = pathlib.Path(words['--directory'], 'made')\n"
        "if '--make' in sys.argv: path.write_text(words['--ranks'])\n"
        "result = {'seconds': {'step': [float(path.read_text())]}, 'versions': {}}\n"
        "json.dump(result, open(words['--result'], 'w'))\n"
    )
    settings = Settings(quick=True, rounds=1, folder=tmp_path)
    result = suite.run([alone("makes")._replace(makers=3)], settings, lambda _: None)
    assert result["failed"] == []
    assert result["runs"][0]["seconds"]["step"] == [3.0]


def test_the_command_line_chooses_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen: list[Case] = []

    def run(cases: list[Case], settings: Settings, say: Any) -> dict[str, Any]:
        assert settings.rounds == 2
        chosen[:] = cases
        return recorded.result(cases)

    monkeypatch.setattr(commands, "run", run)
    path = tmp_path / "result.json"
    words = ["bench", "--rounds", "2", "--output", str(path), "--only"]
    assert cli.main([*words, "rules", "kernel"]) == 0
    assert {case.part for case in chosen} == {"rules", "kernel"}
    assert {case.name for case in chosen if case.part == "kernel"} == {"all rules, 16M elements"}
    assert "59M, Adam" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["runs"]) == len(chosen)
    assert cli.main([*words, "kernel", "--quick"]) == 0
    assert {case.name for case in chosen} == {"all rules, 2M elements"}
    chosen.clear()
    for wrong in ["--rounds", "0"], ["--output", str(tmp_path)], ["--output", f"{path}/x.json"]:
        with pytest.raises(SystemExit):
            cli.main(["bench", *wrong])
    said = " ".join(capsys.readouterr().err.split())
    assert "'0' is not a number from 1 on" in said and "x.json cannot be written" in said
    assert not chosen


def test_a_spread_is_of_eight_tenths() -> None:
    assert Spread.of([3.0]) == (3.0, 3.0, 3.0)
    assert Spread.of([float(n) for n in range(11)]) == (1.0, 5.0, 9.0)


def test_rounds_of_a_case_are_one_row() -> None:
    result = recorded.result([case for case in suite.cases() if case.part == "ranks"])
    again = [
        run | {"round": 1, "seconds": {"step": [9.0], "memcpy": [1.0]}} for run in result["runs"]
    ]
    once = rows(result, "ranks")
    twice = rows(result | {"runs": result["runs"] + again}, "ranks")
    assert [row[:4] for row in twice] == [row[:4] for row in once]
    assert all(row.seconds["step"].high > row.seconds["step"].median for row in twice)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (1.0, 4.04, "4.0 times slower"),
        (1.0, 1.2, "1.20 times slower"),
        (1.0, 1.02, "as fast"),
        (1.0, 0.97, "as fast"),
        (1.0, 0.5, "**2.0 times faster**"),
        (1.0, 0.8, "**1.25 times faster**"),
        (None, 0.5, ""),
    ],
)
def test_who_is_faster_is_said(ours: float | None, theirs: float, words: str) -> None:
    assert against(ours, theirs) == words


def test_a_row_says_that_a_peer_is_faster() -> None:
    known = [case for case in suite.cases() if case.part == "step"]
    result = recorded.result(known)
    for run in result["runs"]:
        if run["system"] == "chainermn" and run["name"] == "19M":
            run["seconds"]["step"] = [1e-3]
    (line,) = (line for line in text(result).splitlines() if "faster" in line)
    assert line.startswith("| 19M ") and "ChainerMN" in line


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(12.345, "12.3 s"), (1234.5, "1234 s"), (0.0123, "12.3 ms"), (4.2e-6, "4.2 us")],
)
def test_seconds_have_three_digits(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_memcpys_are_those_of_the_same_row() -> None:
    spreads = {"step": Spread(1.0, 2.0, 3.0), "memcpy": Spread(0.5, 0.5, 0.5)}
    assert Row("step", "", "", 2, spreads, {}).in_memcpys == 4.0
    assert Row("step", "", "", 2, {"step": spreads["step"]}, {}).in_memcpys is None


def test_what_others_use_is_not_what_own_children_use() -> None:
    with Load() as load:
        pass
    assert load.others >= 0
