"""What befalls one rank of a training, or happens on all ranks to let it befall one."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from smorms3_dist import CheckpointError, load_checkpoint, save_checkpoint

import checkpoints
import disks
import numpy as np
import stages
import trainings

INSTEAD = "what happens takes the place of the update"
SAVED = (3, 5)
"""Before the updates of these steps checkpoints are saved."""

Act = Callable[[Any], Any]
"""It is called with a `kinds.Run`."""


class Planted(Exception):
    """What a rank raises as its fault."""


class Left(Exception):
    """Ends the script of a rank early, and well."""


class Hook:
    """A hook of a user's that sees whole gradients."""

    name = "own"
    call_for_each_param = False
    timing = "pre"

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __call__(self, optimizer: Any) -> None:
        self.work(optimizer.target.e)


def hooked(work: Callable[[Any], Any], timing: str) -> Act:
    return lambda run: run.optimizer.add_hook(Hook(work), timing=timing)


def raises(*_: Any) -> None:
    raise Planted("planted")


def leaves(run: Any) -> None:
    raise Left


def raising_hook(run: Any) -> None:
    if run.step == 1:
        run.optimizer.add_hook(Hook(lambda param: raises() if run.is_hit else None))


def other_hyperparameter(run: Any) -> None:
    _change_one(run, run.optimizer)


def other_hyperparameter_of_a_rule(run: Any) -> None:
    _change_one(run, run.optimizer.target.e.update_rule.hyperparam)


def _change_one(run: Any, changed: Any) -> None:
    values = run.optimizer.hyperparam.get_dict()
    name = run.draw.choice(sorted(key for key in values if type(values[key]) is float))
    setattr(changed, name, values[name] / 2 + 0.125)


def other_hook(hook: Any) -> Act:
    """Adds a hook, in the place of one of that name."""

    def act(run: Any) -> None:
        with contextlib.suppress(KeyError):
            run.optimizer.remove_hook(hook.name)
        run.optimizer.add_hook(hook)

    return act


def save(run: Any, step: int | None = None, **options: Any) -> Any:
    return save_checkpoint(run.directory, run.optimizer, step=step or run.step, **options)


def on_first_step(act: Act) -> Act:
    return lambda run: act(run) if run.step == 1 else None


def flip(path: Path, draw: random.Random) -> None:
    checkpoints.flip(path, draw.randrange(path.stat().st_size))


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def starting_again(damage: Callable[[Path, random.Random], None], steps: Iterable[int]) -> Act:
    """Saves, and starts again from what is left when files of some steps are damaged."""

    def prepare(run: Any) -> None:
        if run.started_again or run.step not in SAVED:
            return
        save(run)
        if run.step < SAVED[-1]:
            return
        run.optimizer.collectives.all_gather_object("all have saved")
        for step in steps if run.comm.rank == run.fault.rank else ():
            files = sorted(run.directory.glob(f"step-*{step}/*"))
            # The shard of a rank that owns nothing is no more than a header, which nobody reads.
            read = [path for path in files if path.stat().st_size > 64]
            damage(run.draw.choice(read if damage is flip else files), run.draw)
        run.optimizer.collectives.all_gather_object("there is damage")
        start_again(run)

    return prepare


def start_again(run: Any) -> None:
    run.started_again = True
    run.optimizer = run.make()
    manifest = load_checkpoint(run.directory, run.optimizer)
    assert manifest is not None
    run.step = manifest.step


def limited(run: Any, draw: random.Random) -> contextlib.AbstractContextManager[None]:
    """No file can be as large as one that the rank has to write."""
    ending = f"-{run.fault.rank:05d}.safetensors"
    files = [path for path in run.directory.glob("step-*/*") if path.name.endswith(ending)]
    return disks.file_size_limit(draw.randrange(max(path.stat().st_size for path in files)))


def broken(run: Any, draw: random.Random) -> contextlib.AbstractContextManager[None]:
    """A call fails that the rank has to make."""
    patterns = [f"{kind}-{run.fault.rank:05d}.safetensors" for kind in ("shard", "rank")]
    calls = [("fsync", pattern) for pattern in patterns]
    if run.fault.rank == 0:
        patterns = ["manifest.json", r"/[.]saving-step-\d+-\w+", re.escape(str(run.directory))]
        calls += [("rename", patterns[1]), *(("fsync", pattern) for pattern in patterns)]
    return disks.failing(*draw.choice(calls))


@contextlib.contextmanager
def full(run: Any, draw: random.Random) -> Iterator[None]:
    """The disk has less space than a step takes."""
    sizes = [path.stat().st_size for path in run.directory.glob("step-*/*")]
    page = os.statvfs(run.directory).f_frsize
    disks.fill(run.directory, draw.randrange(sum(-(-size // page) for size in sizes)) * page)
    yield
    (run.directory / "filler").unlink()


def refusing(trouble: Callable[[Any, random.Random], Any], asynchronous: bool) -> Act:
    """The disk refuses the second save: that is told, and the first is there, to go on from.

    Or the training goes on as it is, and saves again.
    """

    def prepare(run: Any) -> None:
        if run.step not in SAVED:
            return
        if run.step == SAVED[-1] and not run.started_again:
            goes_back, looks = run.draw.random() < 0.5, run.draw.random() < 0.5
            meet = run.optimizer.collectives.all_gather_object
            is_here = run.comm.rank == run.fault.rank
            with trouble(run, run.draw) if is_here else contextlib.nullcontext():
                meet("the disk is in trouble")
                _be_refused(run, asynchronous, looks)
                meet("all know of it")
            meet("the trouble is over")
            assert SAVED[0] in trainings.whole_steps(run.directory)
            run.started_again = True
            if goes_back:
                start_again(run)
                return
        save(run, asynchronous=asynchronous).wait()
        assert trainings.whole_steps(run.directory)[-1] == run.step
        assert trainings.debris(run.directory) == set()

    return prepare


def _be_refused(run: Any, asynchronous: bool, looks: bool) -> None:
    try:
        saver = save(run, asynchronous=asynchronous)
        while looks and run.step < SAVED[-1] + 1:
            run.update()
            run.step += 1
        saver.wait()
    except CheckpointError as error:
        words = r"cannot be (written|synced|renamed): .* \(rank \d on "
        assert re.search(words, str(error)), error
    else:
        raise AssertionError("it was saved")


def failing_after_a_save(run: Any) -> None:
    """What is called after a save raises, beside the training, which goes on and saves again."""

    def upload(step: int, path: Path) -> None:
        assert (path / "manifest.json").is_file()
        raise OSError("no route to the host")

    if run.step == run.fault.step:
        save(run, asynchronous=True, keep_last=1, after_save=upload)
    elif run.step == run.fault.step + 1:
        save(run, asynchronous=True, keep_last=1).wait()
        assert trainings.whole_steps(run.directory) == [run.step]


def killed_in_a_save(asynchronous: bool) -> Act:
    """The second save is killed at one of its stages; another job goes on from what is there."""

    def prepare(run: Any) -> None:
        stage = random.Random(run.fault.seed).choice(stages.STAGES)
        again = stage.startswith("replaced")
        if run.attempt > 0 and not run.started_again:
            start_again(run)
            committed = stages.STAGES.index(stage) >= stages.STAGES.index("after rename")
            assert run.step == SAVED[again or committed], (run.step, stage)
            assert run.step == trainings.whole_steps(run.directory)[-1]
            return
        if run.step not in SAVED:
            return
        if run.step == SAVED[-1] and run.attempt == 0:
            if again:
                save(run)
            # The last of four ranks owns nothing, and writes no more than a header.
            where = f":{run.fault.rank % 3}" if " file " in stage else ""
            stages.die_at(stage + where)
        saver = save(run, asynchronous=asynchronous, keep_last=1)
        saver.wait()
        assert run.started_again or run.step == SAVED[0], f"it has outlived {stage}"
        assert trainings.debris(run.directory) == set()

    return prepare


def two_optimizers(run: Any) -> None:
    """Trains another model beside the first: in another order where the fault is."""
    if run.step == 1:
        run.other = run.make()
    if not run.is_hit:
        run.other.update()


def stopped_and_killed(run: Any) -> None:
    script = f"kill -STOP {os.getpid()}; sleep 0.3; kill -KILL {os.getpid()}"
    subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    signal.pause()


def killed(run: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def skips(run: Any) -> str:
    return INSTEAD


def updates_with_nan(run: Any) -> str:
    run.update(np.nan)
    return INSTEAD


def updates_the_first_optimizer_first(run: Any) -> str:
    run.update()
    run.other.update()
    return INSTEAD
