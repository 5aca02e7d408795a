"""The page of the benchmark: made of stored runs, with their pictures, and as it is committed."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import cases as cases_of_checkout
from benchmarks import page
from benchmarks.cases import PARTS, cases

import pytest
import recorded

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no root, no C compiler, and nothing that makes two hosts."""
    monkeypatch.setattr(cases_of_checkout, "TWO_HOSTS", Path(__file__))
    monkeypatch.setattr(cases_of_checkout.os, "geteuid", lambda: 0)
    monkeypatch.setattr(cases_of_checkout.shutil, "which", lambda name: name)


def results(*parts: str, started: str = "2030-01-01") -> list[dict]:
    known = [c for c in cases("python") if c.quick != "alone" and (not parts or c.part in parts)]
    return [recorded.result(known, started=started)]


def section(text: str, name: str) -> str:
    return re.search(rf"<!-- results: {name} -->\n(.*?)(?=\n## |\Z)", text, re.S)[1]


def test_each_part_is_on_the_page_with_what_was_measured(tmp_path: Path) -> None:
    template = page.PAGE.read_text()
    text = page.made(template, results(), tmp_path)
    # What ranks exchange is there for the model alone.
    assert set(re.findall(r"<!-- results: (\w+) -->", text)) == {*PARTS, "conditions", "model"} - {
        "exchange"
    }
    assert page.NOTHING not in text
    assert len(text.splitlines()) <= 250
    assert [line for line in text.splitlines() if len(line) > 120 and line[0] != "|"] == []
    pictures = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert pictures == set(re.findall(r"!\[.*\]\((.*)\)", text))
    assert len(pictures) == 9
    assert all((tmp_path / path).stat().st_size < 60_000 for path in pictures)
    assert "**1.25 times faster**" in section(text, "checkpoint")
    (line,) = (line for line in section(text, "step").splitlines() if "| 2000 small" in line)
    assert " memcpys; 2.00 of one array's; " in line
    alone, *several = (line for line in section(text, "ranks").splitlines() if line[2:3].isdigit())
    assert "times faster" not in alone
    assert len(several) == 7 and all("**1.25 times faster** |" in line for line in several)


def test_made_again_the_page_stays_as_it_is(tmp_path: Path) -> None:
    once = page.made(page.PAGE.read_text(), results("checks", "start"), tmp_path)
    assert page.made(once, results("checks", "start"), tmp_path) == once


def test_who_is_faster_or_takes_less_memory_is_said_in_its_row(tmp_path: Path) -> None:
    stored = results("rules")
    for run in stored[0]["runs"]:
        if run["system"] == "chainermn" and run["name"] == "59M, Adam":
            run["seconds"]["step"], run["peak_over_base_bytes"] = [1e-3], [1 << 20] * 2
    text = page.made(page.PAGE.read_text(), stored, tmp_path)
    (line,) = (line for line in text.splitlines() if "**" in line and line[:1] == "|")
    assert line.startswith("| 59M, Adam ")
    assert " times faster**; 1 MiB, **less** " in line


def test_of_each_part_the_newest_run_counts(tmp_path: Path) -> None:
    old, new = results("checks", "start"), results("start", started="2030-02-02")
    new[0]["runs"][0]["seconds"]["import numpy"] = [7.0]
    text = page.made(page.PAGE.read_text(), [*new, *old], tmp_path)
    assert "| 7 s" in section(text, "start")
    conditions = section(text, "conditions")
    assert conditions.index("2030-02-02") < conditions.index("2030-01-01")
    assert "parts: start" in conditions and "parts: checks, start" in conditions


def test_without_runs_the_page_says_so(tmp_path: Path) -> None:
    text = page.made(page.PAGE.read_text(), [], tmp_path)
    names = re.findall(r"<!-- results: (\w+) -->", text)
    assert all(section(text, name).strip() == page.NOTHING for name in names)


def test_the_committed_page_is_that_of_the_stored_runs(tmp_path: Path) -> None:
    committed = page.PAGE.read_text()
    stored = page.stored()
    assert page.made(committed, stored, tmp_path) == committed
    made = {path.name for path in tmp_path.rglob("*.png")}
    there = {path.name for path in (page.PAGE.parent / page.PICTURES).glob("*.png")}
    assert made == there
