"""The command line of smorms3-dist run, and what is wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path

from smorms3_dist.launch import environment, run_module
from smorms3_dist.launch.arguments import Options, check_ranks, parse, ranks_of
from smorms3_dist.launch.hosts import Host

import pytest

PYTHON = (sys.executable, run_module.__file__, "smorms3_dist")


@pytest.fixture(autouse=True)
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    (tmp_path / "hosts").write_text("h1 slots=2\nh2:2\n")


def read(*arguments: str) -> Options:
    return parse(arguments, "smorms3-dist run")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("-n 4 train.py -n 3 --epoch=2 -- -m x", "./train.py -n 3 --epoch=2 -- -m x"),
        # A script may be called as a command is.
        ("-n4 checkpoint", "./checkpoint"),
        ("-n 4 -m my.training --help", "-m my.training --help"),
    ],
)
def test_what_follows_the_script_is_the_scripts_and_other_commands_are_run(
    arguments: str, command: str
) -> None:
    Path("checkpoint").touch()
    options = read(*arguments.split())
    assert options.ranks == 4
    assert options.command == (*PYTHON, *command.split())
    assert options.is_python
    options = read("-n", "2", "--", "sh", "-c", "exit 3")
    assert options.command == ("sh", "-c", "exit 3")
    assert not options.is_python


@pytest.mark.parametrize("given", ["-n 4", "-np 4", "-n4", "--np=4", "--ranks 4"])
def test_ranks_are_counted_as_users_of_other_launchers_do(given: str) -> None:
    assert read(*given.split(), "train.py", "-np", "3").ranks == 4


def test_ranks_of_each_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cores", lambda: 3)
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    assert read("-n", "auto", "train.py").ranks == "auto"
    assert read("--nproc-per-node=auto", "train.py").ranks_per_host == 3
    monkeypatch.setattr(environment, "gpus", lambda: 2)
    for given, ranks in (("auto", 2), ("gpu", 2), ("cpu", 3), ("5", 5)):
        options = read("--nproc_per_node", given, "-H", "h1,h2:7", "train.py")
        assert options.hosts == (Host("h1", ranks), Host("h2", ranks))


@pytest.mark.parametrize("given", ["--shard", "--shard=", "--shard=uneven=stop,exact=true"])
def test_what_is_to_be_sharded_is_told_to_each_rank(given: str) -> None:
    passed_on = given.rstrip("=")
    options = read("-n", "2", given, "train.py", "--shard", "x")
    assert options.command == (*PYTHON, passed_on, "./train.py", "--shard", "x")
    options = read(given, "-n", "2", "-m", "my.training")
    assert options.command == (*PYTHON, passed_on, "-m", "my.training")


def test_options_have_their_values() -> None:
    options = read(
        *("-H", "h1:2,h2", "--gpus-per-node=4", "-x", "A", "-x", "B=c=d", "--bind-to", "core"),
        *("--mpi-args", "--mca btl 'a b'", "--backend", "mpirun", "--dry-run", "--tee", "0,2-3"),
        "--timestamps",
        *("--log-dir", "logs", "--max-restarts", "3", "--min-ranks", "2", "--checkpoint-dir", "ck"),
        *("--network-interface", "eth0,10.0.0.0/24"),
        *("--timeline", "seen"),
        *("--start-timeout", "5", "--stall-timeout", "6", "--timeout", "7.5", "train.py"),
    )
    assert options.hosts == (Host("h1", 2), Host("h2", 4))
    assert options.environment == {"B": "c=d"}
    assert options.named == ("A", "B")
    assert options.mpi_args == ("--mca", "btl", "a b")
    assert options.interfaces == ("eth0", "10.0.0.0/24")
    assert options.checkpoint_dir == Path.cwd() / "ck"
    assert options.timeline == Path.cwd() / "seen"
    assert options.events == options.timeline / "events.jsonl"
    assert (options.start_timeout, options.stall_timeout, options.timeout) == (5, 6, 7.5)
    assert options.timestamps
    assert (options.max_restarts, options.min_ranks, options.dry_run) == (3, 2, True)
    assert read("--hostfile", "hosts", "train.py").hosts == (Host("h1", 2), Host("h2", 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "2"], "no script is given"),
        (["-n", "0", "train.py"], "whole number from 1 up"),
        (["-H", "h1,h1", "train.py"], "h1 is named twice"),
        (["-H", "h1:x", "train.py"], "'x' slots"),
        (["--hostfile", "nowhere", "train.py"], "cannot be read"),
        (["-H", "h1", "--hostfile", "hosts", "train.py"], "not allowed with"),
        (["-H", "h1:8", "--gpus-per-node", "4", "train.py"], "more than its 4 GPUs"),
        (["-x", "1A", "train.py"], "not the name of a variable"),
        (["--mpi-args", "'", "train.py"], "No closing quotation"),
        (["--network-interface", "eth0,", "train.py"], "'' is no name of an interface"),
        (["--tee", "1,", "train.py"], "is not all, none"),
        (["--min-ranks", "1", "train.py"], "give --max-restarts"),
        (["--timeout", "0", "train.py"], "seconds above 0"),
        (["--timeout", "nan", "train.py"], "seconds above 0"),
        (
            ["--max-restart", "x", "train.py"],
            "no option --max-restart; did you mean --max-restarts?",
        ),
        (["--backend", "mpi", "train.py"], "there is no 'mpi'; did you mean mpirun?"),
        (["-H", "h1:2,h2:4", "--nproc-per-node", "3", "train.py"], "the 2 slots of h1"),
        (["--nproc-per-node", "gpu", "train.py"], "this host has no GPU"),
        (["-n", "2", "--nproc-per-node", "2", "train.py"], "not allowed with"),
        (
            ["--shard=gradient=auto", "train.py"],
            "'gradient' is none of the options double_buffering, ",
        ),
        (["--shard", "--", "python", "train.py"], "--shard is for scripts and modules"),
    ],
)
def test_what_is_wrong_is_said_in_two_lines(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match=r"^2$"):
        read(*arguments)
    error, more = capsys.readouterr().err.splitlines()
    assert message in error
    assert more == "smorms3-dist run --help says more"


def test_help_says_what_signals_and_statuses_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        read("--help")
    text = capsys.readouterr().out
    for word in ("SIGUSR1", "75", "--max-restarts", "--stall-timeout", "-m MODULE"):
        assert word in text


def test_ranks_to_show() -> None:
    assert ranks_of("all", 3) == {0, 1, 2}
    assert ranks_of("none", 3) == frozenset()
    assert ranks_of("0,2-9", 4) == {0, 2, 3}
    for text in ("all", "none", "0,2-9", "3"):
        check_ranks(text, 4)
    with pytest.raises(ValueError, match="--tee 0,5: there is no rank 5; the job has ranks 0 to 1"):
        check_ranks("0,5", 2)
    with pytest.raises(ValueError, match="there is no rank 1; the job has rank 0 only"):
        check_ranks("1-2", 1)
