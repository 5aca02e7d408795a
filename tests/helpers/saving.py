"""Processes that save: run by the tests to be killed, locked out, or refused by the disk.

saving.py kill DIRECTORY            saves steps in copies of a directory, each killed at a stage
saving.py hold DIRECTORY            takes the lock, says so, and waits
saving.py orphan DIRECTORY          takes the lock, forks a child that waits, and dies
saving.py too_large DIRECTORY       comes to its own limit on the size of files
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

from smorms3_dist.checkpoint.files import CheckpointDirectory, CheckpointError, verify
from smorms3_dist.checkpoint.files.manifest import Array

import checkpoints
import disks
import numpy as np
import stages


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
            with CheckpointDirectory(copy) as directory:
                checkpoints.save(directory, step, checkpoints.tiny(100 + step))
                directory.retain(keep_last=2)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # A replacement removes the replaced step, a new step the oldest one.
        passed_by = stage.split()[0] == {2: "old", 3: "replaced"}[step]
        assert status == (0 if passed_by else -signal.SIGKILL), (stage, step, status)


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


def too_large(path: Path) -> None:
    large = {Array("/W", "param", None): np.zeros(100_000, "f4")}
    with CheckpointDirectory(path) as directory:
        checkpoints.save(directory, 1, checkpoints.tiny())
        for limit, model, file in (
            (100_000, large, "shard-00000.safetensors"),
            (100, checkpoints.tiny(), "shard-00000.safetensors"),
            (1000, checkpoints.tiny(), "manifest.json"),
        ):
            try:
                with disks.file_size_limit(limit):
                    files = checkpoints.write_files(directory.begin(2, "two"), model, 2)
                    directory.commit("two", checkpoints.manifest(model, 2, 2, files))
            except CheckpointError as error:
                assert f"{file}: cannot be written: File too large" in str(error), error
                assert str(directory.path) in error.path, error
            else:
                raise AssertionError("it was saved")
            for _ in range(2):
                directory.abort(2, "two")
            directory.abort(3, "neverbegun")
            assert sorted(os.listdir(path)) == [".lock", "step-0000000001"]
            assert list(verify(directory, 1)) == []
        checkpoints.save(directory, 3, checkpoints.tiny())
        assert directory.steps() == [1, 3]


def hold(path: Path) -> None:
    """Is another job, until it is killed."""
    with CheckpointDirectory(path) as directory:
        directory.lock()
        print("locked", flush=True)
        signal.pause()


if __name__ == "__main__":
    {"kill": kill, "hold": hold, "orphan": orphan, "too_large": too_large}[sys.argv[1]](
        Path(sys.argv[2])
    )
