"""Options of smorms3-dist run from a file, the environment and the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from smorms3_dist.launch.arguments import Options, parse

import pytest


@pytest.fixture(autouse=True)
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()


def read(*words: str, file: str = "", **variables: str) -> Options:
    """What holds, where there may be a file, and variables without their common beginning."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(f"SMORMS3_RUN_{name}", value)
        if file:
            Path("run.toml").write_text(file)
            patch.setenv("SMORMS3_RUN_CONFIG", "run.toml")
        return parse((*words, "train.py"), "smorms3-dist run")


def test_the_command_line_counts_more_than_the_environment_and_this_more_than_a_file() -> None:
    file = 'ranks = 3\ntee = "0"\ntimeout = 2.5\nmpi_args = ["--x", "a b"]\nshard = true\n'
    options = read(file=file, TEE="0-1", TIMEOUT="3", DRY_RUN="yes")
    assert (options.ranks, options.tee, options.timeout) == (3, "0-1", 3)
    assert options.mpi_args == ("--x", "a b")
    assert options.dry_run
    assert "--shard" in options.command
    options = read("-n", "4", "--timeout=5", file=file, TEE="", DRY_RUN="0", SHARD="uneven=stop")
    assert (options.ranks, options.tee, options.timeout) == (4, "0", 5)
    assert not options.dry_run
    assert "--shard=uneven=stop" in options.command
    Path("other.toml").write_text("ranks = 7")
    assert read("--config", "other.toml", file=file).ranks == 7


def test_of_options_that_exclude_each_other_the_one_that_counts_more_is_taken() -> None:
    Path("hosts").write_text("h1 slots=2\n")
    options = read("-n", "2", file='nproc-per-node = 4\nhosts = ["h2:3", "h3"]', HOSTFILE="hosts")
    assert (options.ranks, options.ranks_per_host) == (2, None)
    assert options.hosts is not None
    assert [host.name for host in options.hosts] == ["h1"]


def test_variables_for_ranks_are_those_of_all_sources() -> None:
    options = read("-x", "C=3", file='env = ["A=1", "B"]', ENV="'C=2 4' D")
    assert options.named == ("A", "B", "C", "D", "C")
    assert options.environment == {"A": "1", "C": "3"}


@pytest.mark.parametrize(
    ("file", "variables", "message"),
    [
        ("rank = 3", {}, "run.toml: there is no option 'rank'; did you mean ranks?"),
        ("tee = '1,'", {}, "run.toml: argument --tee: '1,' is not all, none"),
        ("ranks = true", {}, "run.toml: ranks needs a value"),
        ("dry-run = 'x'", {}, "run.toml: dry-run is true or false"),
        ("[ranks]", {}, "run.toml: ranks is neither a text"),
        ("ranks = 3\nnproc-per-node = 3", {}, "not allowed with"),
        ("", {"HOSTS": "h1", "HOSTFILE": "run.toml"}, "not allowed with"),
        ("ranks = ", {}, "run.toml is not TOML"),
        ("show-config = true", {}, "there is no option 'show-config'"),
        (
            "",
            {"NUM_RANKS": "3"},
            "SMORMS3_RUN_NUM_RANKS is for no option; did you mean SMORMS3_RUN",
        ),
        ("", {"RANKS": "x"}, "SMORMS3_RUN_RANKS: argument -n/-np/--ranks/--np: 'x' is not"),
        ("", {"CONFIG": "gone.toml"}, "gone.toml cannot be read: No such file"),
    ],
)
def test_what_is_wrong_is_said_with_its_source(
    file: str, variables: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(file=file, **variables)
    assert message in capsys.readouterr().err


def test_what_holds_is_shown_as_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text('tee = "0"\nshard = true\nenv = ["A=1"]\n')
    words = ("--config", "run.toml", "--show-config", "-n", "4", "-x", "B", "--mpi-args", "x 'y z'")
    with pytest.raises(SystemExit, match="0"):
        read(*words, TIMEOUT="5")
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert {
        "ranks = 4  # command line",
        'tee = "0"  # run.toml',
        "shard = true  # run.toml",
        'env = ["A=1", "B"]  # run.toml, command line',
        "timeout = 5.0  # SMORMS3_RUN_TIMEOUT",
        "max-restarts = 0  # default",
    } <= set(lines)
    options = read(file=text)
    assert (options.ranks, options.timeout, options.mpi_args) == (4, 5, ("x", "y z"))


def test_a_python_without_a_reader_of_toml_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(SystemExit, match="2"):
        read(file="ranks = 2")
    assert "pip install tomli" in capsys.readouterr().err
