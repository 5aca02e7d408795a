"""What completes command lines in a shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from smorms3_dist import cli

import pytest

TRY = """
completer=$(complete -p smorms3-dist | grep -o '_[a-z0-9_]*smorms3_dist')
complete_as() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    $completer
    echo "${COMPREPLY[*]}"
}
complete_as smorms3-dist r
complete_as smorms3-dist run -n 2 --max
complete_as smorms3-dist run --backend m
complete_as smorms3-dist run --config ru
complete_as smorms3-dist run -n 2 tra
complete_as smorms3-dist checkpoint verify --a
"""


def test_bash_completes_commands_options_values_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train.py", "run.toml"):
        (tmp_path / name).touch()
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + TRY
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    found = done.stdout.splitlines()
    assert found == ["run", "--max-restarts", "mpirun", "run.toml", "train.py", "--all"]


def test_other_shells_get_a_script_that_knows_all_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for shell in ("zsh", "fish", "tcsh"):
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for command in cli.COMMANDS:
            assert command in script


def test_where_shtab_is_missing_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert "pip install 'smorms3-dist[completion]'" in capsys.readouterr().err
