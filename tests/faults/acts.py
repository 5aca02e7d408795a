"""What befalls one rank of a training, or happens on all ranks to let it befall one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from smorms3_dist import load_checkpoint, save_checkpoint

import checkpoints
import numpy as np

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


def save(run: Any, step: int | None = None, asynchronous: bool = False) -> None:
    step = step or run.step
    save_checkpoint(run.directory, run.optimizer, step=step, asynchronous=asynchronous)


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
        run.started_again = True
        run.optimizer = run.make()
        manifest = load_checkpoint(run.directory, run.optimizer)
        assert manifest is not None
        run.step = manifest.step

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
