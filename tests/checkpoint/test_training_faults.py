"""Trainings on MPI ranks whose checkpoints are damaged, refused by the disk, or cut short."""

from __future__ import annotations

import gc
import os
import re
import shlex
import shutil
import signal
import socket
import weakref
from pathlib import Path

from smorms3_dist import create_multi_node_optimizer, save_checkpoint
from smorms3_dist.checkpoint.files import CheckpointDirectory

import chainer
import checkpoints
import disks
import models
import pytest
import trainings
from rank_threads import ThreadCollectives, run_ranks
from trainings import job

pytestmark = pytest.mark.mpi

FILES = [
    "manifest.json",
    *(f"{kind}-{rank:05d}.safetensors" for kind in ("shard", "rank") for rank in (0, 1)),
]


def flip(path: Path) -> None:
    # In the middle of the data; the beginning of a file is its header.
    checkpoints.flip(path, path.stat().st_size * 2 // 3)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def test_a_damaged_step_is_told_and_the_one_before_is_used(tmp_path: Path) -> None:
    out = tmp_path / "out"
    trainings.fork(2, out, job(tmp_path / "d", until=6))
    damages = {f"{how.__name__} {file}": (how, file) for how in (flip, cut) for file in FILES}
    for name, (how, file) in damages.items():
        shutil.copytree(tmp_path / "d", tmp_path / name)
        how(tmp_path / name / "step-0000000006" / file)
    for step in (4, 6):
        flip(tmp_path / "d" / f"step-{step:010d}" / FILES[2])
    jobs = [job(tmp_path / name, name=name, until=8) for name in damages]
    outcome = trainings.fork(
        2, out, {"name": "never", "until": 8}, *jobs, job(tmp_path / "d", error=True)
    )
    for name, (_, file) in damages.items():
        assert [values["step"] for values in outcome.reports("start", name)] == [4, 4], name
        first, second = (values["said"] for values in outcome.reports("end", name))
        assert second == []
        (words,) = first
        assert words.startswith("step 6 cannot be used: "), name
        assert f"/step-0000000006/{file}" in words, name
        assert outcome.facts(name) == outcome.facts("never"), name
        assert trainings.whole_steps(tmp_path / name) == [6, 8], name
    assert outcome.reports("end") == []
    for values in outcome.reports("error"):
        assert re.search(rf"step-0000000006/{FILES[2]}: is damaged.*\(of rank 1", values["error"])


def test_a_disk_that_is_full_or_read_only_is_told(tmp_path: Path) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    small.mkdir()
    if not disks.can_be_mounted():
        pytest.skip("no disk can be mounted here")
    full = job(small / "d", name="full", trouble=[3, [0], "fill"], error=True)
    again = job(small / "d", name="again")
    refused = job(small / "d", name="refused", until=12, error=True)
    jobs = ([full], [{}, again], [refused])
    first, second, third = (shlex.join(trainings.fork_command(2, out, *each)) for each in jobs)
    script = (
        f"{first}; ls -A {small}/d; rm {small}/filler; {second}; "
        f"mount -o remount,ro {small}; {third}"
    )
    outcome = trainings.outcome_of(disks.mounting(small, script), 3 * trainings.LIMIT)
    assert outcome.status == 0, outcome.output
    # What there was is there, and the rest is not.
    listed = [line for line in outcome.output.splitlines() if line.startswith((".", "step-"))]
    assert listed == [".lock", "step-0000000002"]
    errors = [values["error"] for values in outcome.reports("error", "full")]
    assert len(errors) == 2
    for error in errors:
        assert re.search(
            r"step-0000000004-\w+/.*: cannot be written: No space left on device \(rank \d on ",
            error,
        )
    assert [values["step"] for values in outcome.reports("start", "again")] == [2, 2]
    assert outcome.facts("again") == outcome.facts()
    for values in outcome.reports("error", "refused"):
        assert values["step"] == 10
        assert "/d/.lock: cannot be opened: Read-only file system (rank 0 on " in values["error"]


def test_a_training_that_ends_while_it_saves_ends_at_once(tmp_path: Path) -> None:
    """The disk of one rank has stopped: nobody may wait for it, nor for the ranks that do."""
    out = tmp_path / "out"
    outcomes = {}
    for trouble, rank, blocked in (("fail", 0, 1), ("interrupt", 1, 1), ("terminate", 1, 0)):
        name = f"{trouble} {rank} {blocked}"
        ends = job(tmp_path / name, blocked=[blocked], trouble=[3, [rank], trouble])
        outcomes[name] = trainings.run(2, out, ends)
        assert outcomes[name].status != 0
        shutil.copytree(tmp_path / name, tmp_path / f"kept {name}")
    again = [job(tmp_path / name, name=name) for name in outcomes]
    outcome = trainings.fork(2, out, {"name": "never"}, *again)
    for name, ended in outcomes.items():
        assert ended.reports("end") == []
        if "terminate" not in name:
            assert "this is the original message" in ended.output
        assert trainings.whole_steps(tmp_path / f"kept {name}") == []
        assert [values["step"] for values in outcome.reports("start", name)] == [None, None]
        assert outcome.facts(name) == outcome.facts("never")
        left = trainings.debris(tmp_path / f"kept {name}")
        assert not left & trainings.debris(tmp_path / name)
        assert trainings.whole_steps(tmp_path / name) == [8, 10]


def test_another_trainer_is_refused_on_all_ranks(tmp_path: Path) -> None:
    path, out = tmp_path / "d", tmp_path / "out"
    outcome = trainings.fork(
        2,
        out,
        # What another exception says is not its own end.
        job(path, until=4, handled=True),
        job(path, name="extra", extra=True, error=True),
        job(path, name="examples", examples=40, error=True),
    )
    for name, words in (
        ("extra", r"has no trainer/extensions/Extra/state of rank 0: .* \(seen by rank 0 on "),
        ("examples", r"trainer/updater/iterator:main/order does not fit: .* \(seen by rank 0 on "),
    ):
        errors = [values["error"] for values in outcome.reports("error", name)]
        assert len(errors) == 2
        for error in errors:
            assert re.search(rf"/step-0000000004: .*{words}", error)
    assert trainings.whole_steps(path) == [2, 4]


def test_a_second_job_is_refused_and_the_first_can_be_ended(tmp_path: Path) -> None:
    path, out = tmp_path / "d", tmp_path / "out"
    with trainings.Job(2, out, job(path, blocked=[0, 1], trouble=[3, [0], "tell"])) as first:
        pid = first.wait_for("in flight")["pid"]
        before = sorted(os.listdir(path))
        second = trainings.fork(2, out, job(path, until=4, error=True))
        words = (
            f"{path}: is being written to by process {pid} on host {socket.gethostname()}: let it "
            "end, or choose another directory (rank 0 on "
        )
        assert [words in values["error"] for values in second.reports("error")] == [True] * 2
        assert sorted(os.listdir(path)) == before
        first.process.send_signal(signal.SIGTERM)
        ended = first.finish()
    assert ended.status != 0
    assert ended.reports("end") == []
    with CheckpointDirectory(path) as directory:
        directory.lock()
        assert trainings.debris(path) == set()


def test_workers_may_be_forked_while_a_step_is_written(tmp_path: Path) -> None:
    jobs = [{"name": "never", "until": 4}, job(tmp_path / "d", until=4, workers=True)]
    # MPI has threads, which Python does not like at a fork.
    quiet = ["This process"]
    outcome = trainings.outcome_of(trainings.command(2, tmp_path / "out", *jobs, ignored=quiet))
    assert outcome.facts() == outcome.facts("never")
    assert trainings.whole_steps(tmp_path / "d") == [2, 4]


def test_many_saves_take_the_memory_of_one(tmp_path: Path) -> None:
    kinds = ["mpi", "interface"]
    jobs = [job(tmp_path / kind, name=kind, large=kind) for kind in kinds]
    outcome = trainings.expect(2, tmp_path / "out", *jobs)
    for kind in kinds:
        growths = [values["bytes"] for values in outcome.reports("growth", kind)]
        assert len(growths) == 2
        # One more copy of what a rank owns would take 5 MB; buffers take less than 2.
        assert max(growths) < 3 << 20, (kind, growths)
        assert trainings.whole_steps(tmp_path / kind) == [5]


def test_a_saver_does_not_keep_a_model_alive(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> weakref.ref[chainer.Link]:
        optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), collectives)
        optimizer.setup(models.Model())
        saver = save_checkpoint(tmp_path, optimizer, asynchronous=True)
        saver.wait()
        for step in (-1, 1 << 63):
            with pytest.raises(ValueError, match=f"a step is from 0 to .*, not {step}"):
                save_checkpoint(tmp_path, optimizer, step=step)
        return weakref.ref(optimizer.target)

    (model,) = run_ranks(1, run)
    gc.collect()
    assert model() is None
