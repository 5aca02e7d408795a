"""README.md and the pages: their form, and whether what they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from smorms3_dist import cli

import pages
import pytest

EVERYTHING = [*pages.PAGES, *pages.REST]
COMMANDS = ["run", "install-chainer", "demo", "doctor", "bench", "plan", "timeline", "plot"]
COMMANDS += ["checkpoint", "completion"]
CHECKPOINT = ["list", "inspect", "verify", "diff", "export"]


def named(path: Path) -> str:
    return path.name


def test_the_readme_is_short_and_tells_where_it_has_run() -> None:
    lines = (pages.ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 120
    cells = [cell.strip() for line in lines if line[:1] == "|" for cell in line.split("|")]
    assert max(map(len, cells)) <= 80
    text = "\n".join(lines)
    assert "bash launchers/quickstart.sh " in text and "bash tests/run.sh " in text
    assert "**No GPU has run it yet**" in text
    for page in (pages.ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"(docs/{page.name})" in text


@pytest.mark.parametrize("page", EVERYTHING, ids=named)
def test_a_page_is_short_and_its_lines_fit(page: Path) -> None:
    lines = page.read_text().splitlines()
    # One of them is looked up by a message, and not read.
    assert len(lines) <= (300 if page.name == "troubleshooting.md" else 250)
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize("page", EVERYTHING, ids=named)
def test_each_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert anchor in slugs


@pytest.mark.parametrize("page", pages.PAGES, ids=named)
def test_python_on_a_page_compiles(page: Path) -> None:
    for code in pages.blocks(page.read_text(), "python"):
        compile(code, page.name, "exec")


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*command, "--help"])
    return capsys.readouterr().out


def test_each_command_and_option_that_is_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(cli.COMMANDS) == COMMANDS
    known = {command: help_of(capsys, command) for command in COMMANDS}
    known["checkpoint"] += "".join(help_of(capsys, "checkpoint", each) for each in CHECKPOINT)
    scripts = [*(pages.ROOT / "examples").rglob("*.py"), pages.ROOT / "tests" / "run.sh"]
    scripts += (pages.ROOT / "launchers").glob("*.s[hb]*")
    anywhere = " ".join([*known.values(), *(each.read_text() for each in scripts)])
    for page in pages.PAGES:
        text = page.read_text()
        calls = r"(?:smorms3-dist|-m smorms3_dist) ([a-z][a-z-]*)\b(?!\.)(.*)"
        for command, rest in re.findall(calls, text):
            assert command in COMMANDS, (page.name, command)
            own = re.split(r"`|  #|\w\.py\b| -- ", rest)[0]
            for option in re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", own):
                assert re.search(rf"(?<![\w-]){option}\b", known[command]), (page.name, option)
        # The table for those who know other launchers names their options, and ours at the end.
        for row in re.findall(r"^\| torchrun .*?(?:\n\n|\Z)", text, flags=re.M | re.S):
            for line in row.splitlines():
                for option in re.findall(r"`(--[a-z-]+|-[a-z]\b)", line.rpartition(" | ")[2]):
                    assert re.search(rf"(?<![\w-]){option}\b", known["run"]), (line, option)
        ours = re.sub(r"^\| torchrun .*?(?:\n\n|\Z)", "", text, flags=re.M | re.S)
        for option in re.findall(r"`(--[a-z0-9-]+)", ours):
            assert option in anywhere, (page.name, option)


def test_messages_on_the_page_of_gpus_are_those_of_the_package() -> None:
    sources = [path.read_text() for path in (pages.ROOT / "smorms3_dist").rglob("*.py")]
    # Texts stand on several lines, and have places for what differs.
    text = re.sub(r'"\s*f?"', "", re.sub(r"\{[^{}]*\}", "...", "\n".join(sources)))
    table = (pages.ROOT / "docs" / "gpus.md").read_text().partition("## By message")[2]
    messages = re.findall(r"^\| `([^`]*)`", table.partition("## ")[0], re.M)
    assert len(messages) == 3
    for message in messages:
        for part in message.removesuffix("...").split("..."):
            assert part.strip() in text, message


@pytest.mark.parametrize("page", EVERYTHING, ids=named)
def test_each_script_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    for block in pages.blocks(text, "bash"):
        for line in block.splitlines():
            shlex.split(line, comments=True)
    folders = "launchers|tests|docs|benchmarks|docker|examples"
    for path in re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]*\w", text):
        assert (pages.ROOT / path).exists(), path
