"""The face: public names, and the two commands without a command of theirs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import smorms3_dist
from smorms3_dist import cli

import pytest

PUBLIC = [
    "CheckpointError",
    "DamagedCheckpointError",
    "NoCheckpointError",
    "NoMoreBatches",
    "Preempted",
    "ShardedCheckpoint",
    "ShardedOptimizer",
    "StepMeter",
    "compat",
    "create_multi_node_optimizer",
    "extensions",
    "latest_step",
    "load_checkpoint",
    "save_checkpoint",
    "shard",
    "use_gpu",
]


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert dir(smorms3_dist) == PUBLIC == sorted(smorms3_dist.__all__)
    for name in PUBLIC:
        assert getattr(smorms3_dist, name) is not None


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(smorms3_dist.__file__).parent / "py.typed").is_file()


def test_the_version_is_that_of_the_distribution() -> None:
    assert smorms3_dist.__version__ == importlib.metadata.version("smorms3-dist")


@pytest.mark.parametrize(
    "command",
    [[Path(sys.executable).parent / "smorms3-dist"], [sys.executable, "-m", "smorms3_dist"]],
)
def test_both_commands_say_the_version(command: list[str]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"smorms3-dist {smorms3_dist.__version__}\n"


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    bare = capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    assert (bare.out, bare.err) == (capsys.readouterr().out, "")
    for command in cli.COMMANDS:
        assert f"\n  {command} " in bare.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runx", "-n", "2"], "there is no command 'runx'; did you mean run?"),
        (["xyz"], "there is no command 'xyz'; there are run, install-chainer, "),
        (["train.py"], "train.py is no command; did you mean smorms3-dist run train.py?"),
        (["--versoin"], "there is no option --versoin; did you mean --version?"),
    ],
)
def test_a_command_that_is_none_is_an_error(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    error, more = capsys.readouterr().err.splitlines()
    assert error.startswith(f"smorms3-dist: error: {said}")
    assert more == "smorms3-dist --help says more"
