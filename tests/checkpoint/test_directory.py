"""CheckpointDirectory: a step is whole or does not exist, whenever a save is cut short."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files import (
    CheckpointDirectory,
    CheckpointError,
    StepReader,
    manifest_json,
    verify,
)

import checkpoints
import pytest
from process import run
from stages import STAGES

SAVING = Path(checkpoints.__file__).with_name("saving.py")
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
PASSING = re.compile(r"[.](saving|replaced|removing)-.*")


def saved(path: Path, *steps: int) -> CheckpointDirectory:
    directory = CheckpointDirectory(path)
    for step in steps:
        checkpoints.save(directory, step, checkpoints.tiny(step))
    return directory


def seed_of(directory: CheckpointDirectory, step: int) -> int:
    """Which model a step holds, whole and undamaged."""
    assert list(verify(directory, step)) == []
    with StepReader(directory, step) as reader:
        model = checkpoints.read_all(reader)
    for seed in (step, 100 + step):
        if all((values == model[a]).all() for a, values in checkpoints.tiny(seed).items()):
            return seed
    raise AssertionError(f"step {step} mixes two saves")


def debris(path: Path) -> list[str]:
    return [name for name in os.listdir(path) if PASSING.fullmatch(name)]


def test_steps_are_found_by_looking(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path / "a" / "b")
    assert (directory.steps(), directory.latest(), directory.damaged()) == ([], None, {})
    with pytest.raises(CheckpointError, match="has no step 3; it has none"):
        directory.manifest(3)
    assert not (tmp_path / "a").exists()
    with saved(directory.path, 3, 20, 10**10) as directory:
        for name in ("3", "00000000003", "x", "9" * 30):
            (directory.path / f"step-{name}").mkdir()
        for name in ("other", ".saved"):
            (directory.path / name).mkdir()
        assert directory.steps() == [3, 20, 10**10]
        assert directory.latest() == 10**10
        assert directory.path_of(3) == directory.path / "step-0000000003"
        assert directory.manifest(20).step == 20
        assert directory.damaged() == {}
        assert debris(directory.path) == []
    (tmp_path / "f").touch()
    directory = CheckpointDirectory(tmp_path / "f")
    for attempt in (directory.steps, directory.latest, directory.lock):
        with pytest.raises(CheckpointError, match=r"/f: cannot be (listed|made)"):
            attempt()


def test_a_step_that_is_not_whole_is_no_step(tmp_path: Path) -> None:
    with saved(tmp_path, 1, 2, 3, 4, 5, 6) as directory:
        os.remove(directory.path_of(2) / "shard-00001.safetensors")
        os.truncate(directory.path_of(3) / "rank-00000.safetensors", 10)
        os.remove(directory.path_of(4) / "manifest.json")
        (directory.path / "step-0000000007").mkdir()
        (directory.path / "step-0000000008").touch()
        shutil.copytree(directory.path_of(1), directory.path / "step-0000000009")
        os.remove(directory.path_of(6) / "rank-00001.safetensors")
        (directory.path_of(6) / "rank-00001.safetensors").mkdir()
        assert directory.steps() == [1, 5]
        assert directory.latest() == 5
        reasons = {step: str(error) for step, error in directory.damaged().items()}
    assert sorted(reasons) == [2, 3, 4, 6, 7, 8, 9]
    assert reasons[2].endswith("shard-00001.safetensors: is missing (of rank 1 on host node0)")
    assert "rank-00000.safetensors: has 10 bytes, and" in reasons[3]
    assert "No such file" in reasons[4]
    assert "is not a regular file (of rank 1" in reasons[6]
    assert "No such file" in reasons[7]
    assert "Not a directory" in reasons[8]
    assert "is of step 1, not 9" in reasons[9]


@pytest.mark.parametrize("local", [False, True])
def test_a_file_that_is_missing_at_the_commit_is_named(tmp_path: Path, local: bool) -> None:
    model = checkpoints.tiny()
    with CheckpointDirectory(tmp_path, host="node0") as directory:
        saving = directory.begin(2, "t")
        files = checkpoints.write_files(saving, model, 2)
        os.remove(saving / "shard-00001.safetensors")
        manifest = checkpoints.edited(checkpoints.manifest(model, 2, 2, files), local=local)
        hint = r"\)$" if local else r"\); is this a file system that all hosts share\?$"
        with pytest.raises(
            CheckpointError,
            match="shard-00001.safetensors: is missing .of rank 1 on host node0" + hint,
        ):
            directory.commit("t", manifest)
        assert directory.steps() == []
        directory.abort(2, "t")
        assert debris(tmp_path) == []


def test_a_step_is_there_once_a_valid_manifest_is_committed(tmp_path: Path) -> None:
    model = checkpoints.tiny()
    with CheckpointDirectory(tmp_path) as directory:
        files = checkpoints.write_files(directory.begin(2, "t"), model, 2)
        assert directory.steps() == []
        assert directory.saving(2, "t").is_dir()
        manifest = checkpoints.manifest(model, 2, 2, files[1:])
        with pytest.raises(CheckpointError, match="from element 32 of parameter /W on"):
            directory.commit("t", manifest)
        with pytest.raises(ValueError, match="has not been begun"):
            directory.commit("other", manifest)
        directory.commit("t", checkpoints.manifest(model, 2, 2, files))
        assert directory.steps() == [2]
        assert not directory.saving(2, "t").exists()


@pytest.mark.parametrize("token", ["", "a/b", "..", "a-b", "x" * 65])
def test_tokens_and_steps_make_safe_names(tmp_path: Path, token: str) -> None:
    directory = CheckpointDirectory(tmp_path)
    with pytest.raises(ValueError, match="a token is of"):
        directory.saving(1, token)
    for step in (-1, 2**63):
        with pytest.raises(ValueError, match="a step is from 0"):
            directory.saving(step, "t")


def test_each_host_commits_its_own_files(tmp_path: Path) -> None:
    """Two hosts with a file system each, and one manifest."""
    model = checkpoints.tiny()
    hosts = [CheckpointDirectory(tmp_path / f"node{n}", host=f"node{n}") for n in (0, 1)]
    files = []
    for directory in hosts:
        saving = directory.begin(5, "t")
        for file in checkpoints.write_files(saving, model, 4):
            if file.host == directory.host:
                files.append(file)
            else:
                os.remove(saving / file.path)
    manifest = checkpoints.edited(checkpoints.manifest(model, 5, 4, tuple(files)), local=True)
    hosts[0].commit("t", manifest)
    assert [directory.latest() for directory in hosts] == [5, None]
    hosts[1].commit("t", manifest)
    for directory in hosts:
        assert directory.steps() == [5]
        assert list(verify(directory, 5)) == []
        mine = {file.path for file in files if file.host == directory.host}
        assert {file.path for file in directory.present(manifest)} == mine
        assert {file.path for file in directory.expected(manifest)} == mine
        directory.close()
    assert (hosts[0].path_of(5) / manifest_json.NAME).read_bytes() == (
        hosts[1].path_of(5) / manifest_json.NAME
    ).read_bytes()


def test_all_is_on_the_disk_before_the_step_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def syncing(fd: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        fsync(fd)

    def renaming(source: Path, target: Path) -> None:
        events.append(("rename", target.name))
        rename(source, target)

    with saved(tmp_path / "new", 1) as directory:
        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(os, "rename", renaming)
        path = checkpoints.save(directory, 2, checkpoints.tiny())
        checked = [file.name for file in path.iterdir() if file.name != "manifest.json"]
        assert set(events[:4]) == {("sync", name) for name in checked}
        directory.retain(1)
        CheckpointDirectory(tmp_path / "a" / "b").lock()
    assert [f"{kind} {name.split('-')[0]}" for kind, name in events[4:]] == [
        *("sync manifest.json", "sync .saving", "rename step", "sync new"),
        *("rename .removing", "sync new"),
        *("sync a", f"sync {tmp_path.name.split('-')[0]}"),
    ]


def test_the_old_step_comes_back_if_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if ".saving" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with saved(tmp_path, 1, 2) as directory:
        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(CheckpointError, match="cannot be renamed: Input/output error"):
            checkpoints.save(directory, 2, checkpoints.tiny(102))
        assert seed_of(directory, 2) == 2
        assert [name[:7] for name in debris(tmp_path)] == [".saving"]
        monkeypatch.undo()
        # A damaged step is replaced, too.
        os.remove(directory.path_of(2) / "manifest.json")
        checkpoints.save(directory, 2, checkpoints.tiny(102))
        assert seed_of(directory, 2) == 102


def test_retention_keeps_the_newest_and_every_so_many(tmp_path: Path) -> None:
    with saved(tmp_path, *range(0, 100, 10)) as directory:
        assert directory.retain(20) == []
        assert directory.retain(3, keep_every=40, protect=[10]) == [60, 50, 30, 20]
        assert directory.steps() == [0, 10, 40, 70, 80, 90]
        assert directory.retain(1) == [80, 70, 40, 10, 0]
        assert sorted(os.listdir(tmp_path)) == [".lock", "step-0000000090"]
        for wrong in [(0, None), (1, 0)]:
            with pytest.raises(ValueError, match="must be positive"):
                directory.retain(*wrong)

    # Damaged ones do not count.
    with saved(tmp_path / "damaged", 1, 2, 3, 4, 5) as directory:
        for step in (1, 3, 5):
            os.remove(directory.path_of(step) / "manifest.json")
        assert directory.retain(2) == [1]
        assert directory.steps() == [2, 4]
        assert sorted(directory.damaged()) == [3, 5]
        assert directory.retain(1) == [3, 2]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / ".saving-mine").touch()
    with saved(tmp_path, 1, 2) as directory:
        (tmp_path / ".saving-step-0000000009-abc").mkdir()
        (tmp_path / ".removing-step-0000000009-abc").symlink_to(tmp_path / "log")
        directory.begin(3, "t")
        assert sorted(directory.clean()) == [
            ".removing-step-0000000009-abc",
            ".saving-step-0000000009-abc",
        ]
        directory.retain(1)
        assert sorted(os.listdir(tmp_path)) == [
            ".lock",
            ".saving-mine",
            ".saving-step-0000000003-t",
            "log",
            "step-0000000002",
        ]


def check_after_the_kill(path: Path, step: int, stage: str) -> None:
    """Steps 1 and 2 were there; step 3 or a new version of step 2 was being saved."""
    reached = STAGES.index(stage)
    committed = reached >= STAGES.index("after rename")
    steps = sorted({1, 2, step} if committed else {1, 2})
    # Two are kept; there are three only where the step is new.
    if len(steps) == 3 and reached >= STAGES.index("old step set aside"):
        steps.remove(1)
    seeds = {1: 1, 2: 2} | ({step: 100 + step} if committed else {})
    directory = CheckpointDirectory(path)
    for _ in range(2):
        # As somebody sees it who only looks, and then as the next job does.
        assert directory.steps() == steps, stage
        assert directory.damaged() == {}
        assert directory.latest() == steps[-1]
        for found in steps:
            assert seed_of(directory, found) == seeds[found], stage
        directory.lock()
    assert debris(path) == []
    checkpoints.save(directory, 4, checkpoints.tiny(4))
    assert seed_of(directory, 4) == 4
    directory.close()


def test_a_save_that_is_killed_leaves_whole_steps(tmp_path: Path) -> None:
    assert run(sys.executable, SAVING, "kill", tmp_path, env=ENV) == (0, "")
    killed = 0
    for stage in STAGES:
        for step in {"replaced": [2], "old": [3]}.get(stage.split()[0], [2, 3]):
            check_after_the_kill(tmp_path / f"{stage} {step}", step, stage)
            killed += 1
    assert killed == 2 * len(STAGES) - 4


def test_two_jobs_cannot_write_to_one_directory(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    saved(tmp_path, 1).close()
    command = [sys.executable, SAVING, "hold", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        for attempt in (
            directory.lock,
            lambda: directory.begin(2, "t"),
            directory.clean,
            lambda: directory.retain(1),
        ):
            with pytest.raises(
                CheckpointError,
                match=rf"^{tmp_path}: is being written to by process {other.pid} on host "
                rf"{re.escape(socket.gethostname())}: let it end",
            ):
                attempt()
        assert directory.steps() == [1]
        for text in ("", "{}", "no json", "[1]", '{"pid": "x", "host": 3}'):
            (tmp_path / ".lock").write_text(text)
            with pytest.raises(CheckpointError, match="written to by another process"):
                directory.lock()
        other.kill()
    checkpoints.save(directory, 2, checkpoints.tiny(2))
    assert directory.steps() == [1, 2]
    # Parts of one process share it, until the last of them has closed it.
    again = CheckpointDirectory(tmp_path)
    saving = directory.begin(3, "t")
    again.lock()
    directory.close()
    assert saving.exists()
    assert subprocess.run(command, env=ENV, capture_output=True).returncode == 1
    again.close()
    saved(tmp_path, 3).close()


def test_a_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    command = [sys.executable, SAVING, "orphan", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert process.wait(60) == -signal.SIGKILL
        os.kill(child, 0)
        saved(tmp_path, 1).close()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(CheckpointError, match="its file system has no locks"):
        CheckpointDirectory(tmp_path).lock()


def test_a_disk_that_takes_no_more_is_told_and_leaves_whole_steps(tmp_path: Path) -> None:
    assert run(sys.executable, SAVING, "too_large", tmp_path, env=ENV) == (0, "")
