"""Processes that save: run by the tests to be killed, locked out, or refused by the disk.

saving.py save DIRECTORY            saves a step of two ranks
saving.py kill DIRECTORY            saves steps in copies of a directory, each killed at a stage
saving.py hold DIRECTORY            takes the lock, says so and waits
saving.py orphan DIRECTORY          takes the lock, forks a child that waits, and dies
saving.py full DIRECTORY            fills the small file system of the directory
saving.py unwritable DIRECTORY      cannot write, but read
saving.py too-large DIRECTORY       comes to its own limit on the size of files
"""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

from smorms3_dist.checkpoint.files import CheckpointDirectory, CheckpointError, verify
from smorms3_dist.checkpoint.files.manifest import Array

import checkpoints
import numpy as np
import stages


def save(path: Path, step: int = 1) -> None:
    """Saves a step of two ranks, then keeps the two newest."""
    with CheckpointDirectory(path) as directory:
        checkpoints.save(directory, step, checkpoints.tiny(100 + step))
        directory.retain(keep_last=2)


def kill(path: Path) -> None:
    """Saves step 2 again, and step 3, each killed at each stage: in ``DIRECTORY/STAGE STEP``."""
    with CheckpointDirectory(path / "before") as directory:
        for step in (1, 2):
            checkpoints.save(directory, step, checkpoints.tiny(step))
    for stage, step in itertools.product([*stages.STAGES, "shard file synced:1"], (2, 3)):
        copy = path / f"{stage} {step}"
        shutil.copytree(path / "before", copy)
        child = os.fork()
        if child == 0:
            stages.die_at(stage)
            save(copy, step)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # A replacement removes the replaced step, a new step the oldest one.
        passed_by = stage.split()[0] == {2: "old", 3: "replaced"}[step]
        assert status == (0 if passed_by else -signal.SIGKILL), (stage, step, status)


def hold(path: Path) -> None:
    directory = CheckpointDirectory(path)
    directory.lock()
    print("locked", flush=True)
    signal.pause()


def orphan(path: Path) -> None:
    directory = CheckpointDirectory(path)
    directory.lock()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def expect(reason: str, directory: CheckpointDirectory, model: checkpoints.Model) -> None:
    """Saves step 2, which fails, and is given up."""
    token = "two"
    try:
        files = checkpoints.write_files(directory.begin(2, token), model, 2)
        directory.commit(token, checkpoints.manifest(model, 2, 2, files))
    except CheckpointError as error:
        assert reason in str(error), error
        assert str(directory.path) in error.path, error
    else:
        raise AssertionError("it was saved")
    directory.abort(2, token)


def check(directory: CheckpointDirectory, steps: list[int]) -> None:
    assert directory.steps() == steps
    assert sorted(os.listdir(directory.path)) == [".lock", *(f"step-{s:010d}" for s in steps)]
    for step in steps:
        assert list(verify(directory, step)) == []


def full(path: Path) -> None:
    with CheckpointDirectory(path) as directory:
        checkpoints.save(directory, 1, checkpoints.tiny())
        # The space ends within the data of a shard, and within a rank's file or the manifest.
        for size in (1 << 20, *range(0, 1 << 18, 1 << 12)):
            free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
            filler = path.parent / "filler"
            if size < free:
                filler.write_bytes(bytes(free - size))
            model = {Array("/W", "param", None): np.zeros((1 << 16) // 2, "f4")}
            try:
                expect("No space left on device", directory, model)
            except AssertionError:
                assert size > 1 << 17
                break
            finally:
                filler.unlink(missing_ok=True)
            check(directory, [1])
        else:
            raise AssertionError("it never fitted")
        check(directory, [1, 2])


def unwritable(path: Path) -> None:
    directory = CheckpointDirectory(path)
    for attempt in (directory.lock, lambda: directory.begin(2, "x"), lambda: directory.retain(1)):
        try:
            attempt()
        except CheckpointError as error:
            assert "Read-only file system" in str(error) or "Permission denied" in str(error), error
        else:
            raise AssertionError("it was written to")
    check(directory, [1])


def too_large(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with CheckpointDirectory(path) as directory:
        checkpoints.save(directory, 1, checkpoints.tiny())
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        model = {Array("/W", "param", None): np.zeros(100_000, "f4")}
        expect("shard-00000.safetensors: cannot be written: File too large", directory, model)
        check(directory, [1])
        checkpoints.save(directory, 3, checkpoints.tiny())
        check(directory, [1, 3])


if __name__ == "__main__":
    commands = {
        "save": save,
        "kill": kill,
        "hold": hold,
        "orphan": orphan,
        "full": full,
        "unwritable": unwritable,
        "too-large": too_large,
    }
    commands[sys.argv[1]](Path(sys.argv[2]))
