"""``smorms3-dist checkpoint``: what the commands say, their exit statuses, and what they import."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from smorms3_dist import CheckpointError, cli, latest_step
from smorms3_dist.checkpoint.files import CheckpointDirectory, verify
from smorms3_dist.checkpoint.files.manifest import Array
from smorms3_dist.checkpoint.tools import progress

import checkpoints
import numpy as np
import process
import pytest
from converting import command, fail, save_trainer, succeed

# What is run is what is tested, wherever the tests are started.
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two steps, of which the older one lacks a file."""
    with CheckpointDirectory(tmp_path / "ck") as directory:
        for step in (3, 20):
            checkpoints.save(directory, step, checkpoints.example(step))
        (directory.path_of(3) / "shard-00001.safetensors").unlink()
    return directory.path


def said(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> list[str]:
    capsys.readouterr()
    assert command(*arguments) == status
    return capsys.readouterr().out.splitlines()


def facts(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> Any:
    text = "\n".join(said(capsys, *arguments, "--json", status=status))
    return json.loads(text, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_list(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = facts(capsys, "list", directory)
    assert (old["step"], old["t"], old["epoch"], old["world_size"]) == (3, 2, 2, 2)
    assert not old["whole"]
    assert "shard-00001.safetensors: is missing (of rank 1 on host node0)" in old["problem"]
    assert (new["step"], new["whole"], new["problem"], new["newest"]) == (20, True, None, True)
    path = CheckpointDirectory(directory).path_of(20)
    assert new["bytes"] == sum(file.stat().st_size for file in path.glob("*.safetensors"))

    header, first, second = said(capsys, "list", directory)
    assert header.split() == ["step", "created", "t", "epoch", "ranks", "size"]
    assert first.split()[:1] == ["3"] and "damaged: " in first
    assert second.endswith("whole, newest")


def test_list_marks_the_best_of_the_whole_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def worth(value: Any, name: str = "accuracy") -> Any:
        note = {"name": name, "mode": "max", "value": value}
        return lambda m: checkpoints.edited(m, notes={**m.notes, "worth": note})

    values = [worth(0.5), worth(0.9), worth(0.8), worth(7, "else"), worth(None), worth("x")]
    with CheckpointDirectory(tmp_path) as directory:
        for step, change in enumerate([*values, worth(0.7)]):
            checkpoints.save(directory, step, checkpoints.tiny(), change=change)
    (directory.path_of(1) / "shard-00001.safetensors").unlink()
    steps = facts(capsys, "list", tmp_path)
    assert [each["best"] for each in steps] == [False, False, True, *[False] * 4]
    assert [each["worth"] and each["worth"]["value"] for each in steps] == [
        *(0.5, 0.9, 0.8, 7),
        *(None, None, 0.7),
    ]
    lines = said(capsys, "list", tmp_path)
    assert lines[3].endswith("whole, best: accuracy 0.8")
    assert sum(", best: " in line for line in lines) == 1


def test_what_is_no_directory_of_steps_is_said_with_what_to_do(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = CheckpointDirectory(directory).path_of(20)
    words = f"step-0000000020: is one step, not a directory of steps: give {directory}, and the "
    for name, *more in (["list"], ["inspect"], ["verify", "--all"], ["export", "x.npz"]):
        arguments = [tmp_path / each if each == "x.npz" else each for each in more]
        assert f"{words}step 20" in fail(capsys, name, step, *arguments)
    # Nor does a training save there, or look for its newest step.
    with pytest.raises(CheckpointError, match="is one step, not a directory of steps"):
        CheckpointDirectory(step).lock()
    with pytest.raises(CheckpointError, match="is one step, not a directory of steps"):
        latest_step(step)
    assert ".lock" not in os.listdir(step)
    shutil.copytree(step, tmp_path / "copy")
    assert "under another name than its own" in fail(capsys, "list", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")

    assert f"but what is in it has: give {directory}\n" in fail(capsys, "list", tmp_path)
    foreign = tmp_path / "foreign"
    for name in ("a", "b", "c", "log", "plot.png"):
        (foreign / name).mkdir(parents=True)
    error = fail(capsys, "verify", foreign)
    assert "is no directory of checkpoints: it has no steps, but a, b, c and 2 more. Give" in error
    (foreign / "snapshot_iter_100").touch()
    assert "such as snapshot_iter_100, which" in fail(capsys, "list", foreign)
    (tmp_path / "new" / ".lock").mkdir(parents=True)
    (tmp_path / "new" / "abandoned-step-0000000001-x").mkdir()
    assert said(capsys, "list", tmp_path / "new") == ["no steps"]


def test_a_manifest_that_cannot_be_read_is_listed_and_verified(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (CheckpointDirectory(directory).path_of(20) / "manifest.json").write_text("{")
    steps = facts(capsys, "list", directory)
    assert [each["newest"] for each in steps] == [False, False]
    assert steps[1]["world_size"] is None
    assert "manifest.json: does not end with its checksum" in steps[1]["problem"]
    assert "damaged: " in said(capsys, "list", directory)[2]
    # The newest is looked at, even if it is not whole.
    (found,) = facts(capsys, "verify", directory, status=1)
    assert found["step"] == 20
    assert "manifest.json" in found["problems"][0]["path"]


def test_inspect(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "inspect", directory)
    assert (found["step"], found["t"], found["world_size"], found["local"]) == (20, 19, 2, False)
    # JSON has no infinite numbers.
    assert found["hyperparameters"] == {"lr": "inf", "eps": 1e-16, "amsgrad": False}
    by_name = {each["name"]: each for each in found["parameters"]}
    assert by_name["/l1/W"]["shape"] == [40, 100]
    assert by_name["/l1/half"]["master"] == "float32"
    assert by_name["/l1/half"]["states"] == dict.fromkeys(("g", "g2", "mem"), "float32")
    assert [each["rank"] for each in found["files"]] == [0, 0, 1, 1]
    assert all(each["present"] for each in found["files"])

    found = facts(capsys, "inspect", directory, "--step", 3)
    assert [each["present"] for each in found["files"]] == [True, True, False, True]

    text = said(capsys, "inspect", directory, "--step", 3)
    assert text[0].startswith("step 3 in ")
    (line,) = (line for line in text if line.startswith("/l1/half"))
    assert line.split()[:2] == ["/l1/half", "(7,)"] and "master (float32)" in line
    (line,) = (line for line in text if line.startswith("shard-00001"))
    assert line.endswith("missing here, or of another size")


def test_verify(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = facts(capsys, "verify", directory)
    assert (found["step"], found["problems"], found["files"]) == (20, [], 4)
    assert said(capsys, "verify", directory, "--step", 20) == [
        f"step 20: 4 files of {progress.size_text(found['bytes'])} are as written"
    ]
    path = CheckpointDirectory(directory).path_of(20)
    for name in ("shard-00001.safetensors", "rank-00000.safetensors"):
        checkpoints.flip(path / name, (path / name).stat().st_size - 1)
    older, newer = facts(capsys, "verify", directory, "--all", status=1)
    assert [problem["rank"] for problem in older["problems"]] == [1]
    assert [problem["rank"] for problem in newer["problems"]] == [0, 1]
    assert newer["problems"][1]["start"] is not None
    lines = said(capsys, "verify", directory, "--all", status=1)
    assert len(lines) == 3
    assert "wrong checksum of the bytes" in lines[2]


def test_verify_leaves_other_hosts_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with CheckpointDirectory(tmp_path, "node0") as directory:
        path = checkpoints.save(
            directory, 1, checkpoints.tiny(), 3, lambda m: checkpoints.edited(m, local=True)
        )
    (path / "shard-00002.safetensors").unlink()
    (line,) = said(capsys, "verify", tmp_path)
    assert line.endswith("; 6 files are those of other hosts, and not looked at")
    (problem, *_) = verify(CheckpointDirectory(tmp_path, "node1"), 1)
    assert (problem.rank, problem.host) == (2, "node1")


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoints.example()
    places = []
    for name in ("a", "b"):
        with CheckpointDirectory(tmp_path / name) as directory:
            checkpoints.save(directory, 1, model, 1 + len(places))
            places.append(directory.path)
        changed = model[Array("/l1/W", "state", "g")]
        changed[3, 4:6] += [0.5, np.inf]
    with CheckpointDirectory(places[0]) as directory:
        checkpoints.save(directory, 2, checkpoints.example(), 3)
    assert facts(capsys, "diff", *places, "--step", 2, "--other-step", 1, status=1)
    assert said(capsys, "diff", places[0], "--step", 1, "--other-step", 2) == [
        "0 of 21 arrays differ"
    ]
    found = facts(capsys, "diff", *places, status=1)
    (difference,) = found["differences"]
    assert difference["array"] == {"parameter": "/l1/W", "kind": "state", "state": "g"}
    assert [difference[key] for key in ("change", "count", "largest")] == ["changed", 2, "inf"]
    assert found["arrays"] == 21
    lines = said(capsys, "diff", *places, "--other-step", 1, status=1)
    assert lines == [
        "state g of /l1/W: changed, 2 elements by up to inf",
        "1 of 21 arrays differ",
    ]
    for file in places[1].glob("step-*/shard-00001.safetensors"):
        file.unlink()
    # Damage is no difference.
    assert "of rank 1 on host" in fail(capsys, "diff", *places)


def test_what_is_not_there_is_one_line(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, *options in (["list"], ["inspect"], ["verify"], ["verify", "--all"]):
        assert "nowhere: is no directory" in fail(capsys, name, tmp_path / "nowhere", *options)
    empty = tmp_path / "empty"
    empty.mkdir()
    rest = {"inspect": [], "verify": [], "diff": [directory], "export": [tmp_path / "o.npz"]}
    for name, more in rest.items():
        assert "has no checkpoint" in fail(capsys, name, empty, *more)
    assert said(capsys, "list", empty) == ["no steps"]
    for name in ("inspect", "verify"):
        error = fail(capsys, name, directory, "--step", 4)
        assert "has no step 4; it has 3, 20" in error
    (CheckpointDirectory(directory).path_of(20) / "manifest.json").unlink()
    error = fail(capsys, "inspect", directory)
    assert "has no whole step: step 3: " in error and "; step 20: " in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["checkpoint"],
        ["unheard"],
        ["checkpoint", "unheard"],
        ["checkpoint", "list"],
        ["checkpoint", "inspect", ".", "--step", "-1"],
        ["checkpoint", "inspect", ".", "--step", "9" * 30],
        ["checkpoint", "verify", ".", "--all", "--step", "1"],
        ["checkpoint", "diff", "."],
        ["checkpoint", "diff", ".", "--step", "1"],
        ["checkpoint", "export", "."],
        ["checkpoint", "export", ".", "x.npz", "--tied", "x"],
        # Gone: a step is loaded at any world size, and so is a snapshot of Chainer's.
        ["checkpoint", "reshard", ".", "out", "--ranks", "2"],
        ["checkpoint", "import", "x.npz", "."],
    ],
)
def test_a_wrong_command_line_is_told_apart(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("smorms3-dist") for line in said] == [True, True]


def test_progress_is_shown_when_asked_for_and_on_a_terminal(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    succeed("verify", directory)
    assert capsys.readouterr().err == ""
    succeed("verify", directory, "--progress")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"verifying step 20: 100% \(.* of .*, [\d.]+ \wB/s\)", lines[-1])
    assert any(re.search(r" of .* \wB, [\d.]+ \wB/s, \d+ s left\)$", line) for line in lines)
    assert len(lines) <= 11
    assert command("diff", directory, "--step", 20, "--other-step", 20, "--progress") == 0
    assert "comparing steps 20 and 20: 100% (" in capsys.readouterr().err
    # On a terminal it is one line, which goes.
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    succeed("verify", directory)
    written = terminal.getvalue()
    assert "\n" not in written
    assert "\rverifying step 20: 100.0% (" in written
    assert written.endswith(" \r")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (9060, "2 h 31 min"),
    ],
)
def test_the_time_that_is_left_is_told_for_people(seconds: float, text: str) -> None:
    assert progress.duration_text(seconds) == text


def test_names_cannot_play_tricks_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {Array("/a\x1b[2J\nb", "param", None): np.zeros(3, "f4")}
    with CheckpointDirectory(tmp_path) as directory:
        checkpoints.save(directory, 1, model)
        checkpoints.save(directory, 2, {a: v + 1 for a, v in model.items()})
    assert facts(capsys, "inspect", tmp_path)["parameters"][0]["name"] == "/a\x1b[2J\nb"
    lines = said(capsys, "inspect", tmp_path)
    assert sum(line.startswith("/a\\x1b[2J\\nb  (3,)") for line in lines) == 1
    diff = said(capsys, "diff", tmp_path, "--step", 1, "--other-step", 2, status=1)
    assert diff[0].startswith("parameter /a\\x1b[2J\\nb: changed")
    error = fail(capsys, "list", tmp_path / "x\ny\x1b")
    assert "x\\ny\\x1b: is no directory" in error


def test_an_interrupted_command_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_trainer(tmp_path / "ck", 2)

    def interrupt(self: Any, done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.Line, "__call__", interrupt)
    for name, *options in (["export", "p.npz"], ["export", "p.npz", "--compress"], ["verify"]):
        arguments = [tmp_path / option if "." in option else option for option in options]
        capsys.readouterr()
        assert command(name, tmp_path / "ck", *arguments, "--progress") == 130
        assert capsys.readouterr().err == "interrupted\n"
    assert os.listdir(tmp_path) == ["ck"]


def test_stdout_may_be_closed_or_full(directory: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    no_space = "smorms3-dist: error: [Errno 28] No space left on device\n"
    for stdout, expected in ((write, (141, "")), (full, (1, no_space))):
        done = subprocess.run(
            [sys.executable, "-m", "smorms3_dist", "checkpoint", "inspect", directory],
            env=ENV,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        os.close(stdout)
        assert (done.returncode, done.stderr) == expected


# Runs a command line where Chainer, CuPy and MPI cannot be imported, and says what was imported.
WITHOUT = """\
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("chainer", "chainermn", "cupy", "mpi4py", "numba"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
from smorms3_dist.cli import main
for arguments in sys.argv[1].split(";"):
    assert main(arguments.split()) == 0, arguments
assert not {"chainer", "chainermn", "cupy", "mpi4py", "numba"} & sys.modules.keys()
"""


def test_nothing_needs_chainer_or_mpi(tmp_path: Path) -> None:
    save_trainer(tmp_path / "ck", 2)
    diff = "diff ck --step 4 --other-step 4"
    exports = ("export ck o.npz", "export ck o.safetensors")
    commands = ("list ck", "inspect ck", "verify ck --all", diff, *exports)
    line = ";".join(f"checkpoint {command}" for command in commands)
    code, output = process.run(sys.executable, "-c", WITHOUT, line, env=ENV, cwd=tmp_path)
    assert code == 0, output


@pytest.mark.parametrize(("encoding", "name"), [("utf-8", "/größe"), ("ascii", "/gr\\xf6\\xdfe")])
def test_the_program_says_what_it_cannot_print(tmp_path: Path, encoding: str, name: str) -> None:
    with CheckpointDirectory(tmp_path / "ck") as directory:
        checkpoints.save(directory, 1, {Array("/größe", "param", None): np.zeros(3, "f4")})
    code, output = process.run(
        *(sys.executable, "-m", "smorms3_dist", "checkpoint", "inspect", tmp_path / "ck"),
        env={**ENV, "PYTHONIOENCODING": encoding},
    )
    assert code == 0, output
    assert name in output
