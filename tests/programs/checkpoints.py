"""Trains with a Trainer on MPI ranks and saves sharded checkpoints, in whatever trouble.

    checkpoints.py OUT [--fork RANKS] JSON...

Each JSON object is a training of its own, made anew and run after the one before: the fields of
`Training`. Every rank reports where it has gone on, and in the end everything that there is to know
of it; or the error, where one is expected. With ``--fork``, each training has forked ranks of its
own, without MPI, and may die.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import threading
import tracemalloc
import types
import warnings
from collections.abc import Iterable
from typing import Any

import smorms3_dist
from smorms3_dist.checkpoint import saving
from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.collectives.chainermn import REQUIRED_METHODS
from smorms3_dist.kernels import selection

import chainer
import chainer.functions as F
import chainer.links as L
import disks
import numpy as np
from chainer.iterators import MultiprocessIterator, SerialIterator
from chainer.training import Extension, Trainer, extensions
from chainer.training.updaters import StandardUpdater
from forked import run_forked
from mpirun import report
from stages import die_at

# To load the compiled one takes longer than these trainings do; the results are the same.
selection.compiled_update = lambda dtype, rank=0: None

comm: Any = None
rank = -1


@dataclasses.dataclass
class Training:
    """What to do."""

    name: str = ""  # comes with the reports
    directories: list[str] = dataclasses.field(default_factory=list)  # of each rank, or one of all
    hosts: list[str] | None = None  # what each rank says its host is; their clocks differ, too
    until: int = 10  # the last iteration
    examples: int = 36  # for all ranks together
    workers: bool = False  # whether other processes, new ones each time, read examples, too
    blocked: list[int] = dataclasses.field(default_factory=list)  # never end writing a shard
    trouble: tuple[int, list[int], str] | None = None  # after an iteration, on ranks: see `Trouble`
    error: bool = False  # whether an error is expected, and reported
    extra: bool = False  # whether rank 0 has one more extension
    handled: bool = False  # whether it runs while an exception is being handled
    dies: str = ""  # the stage at which a rank is killed, as `stages.die_at` takes it
    keep: str = ""  # where the first directory is copied to after the end
    large: str = ""  # instead, many saves of a larger model, over these collectives


class Net(chainer.Chain):
    """Has values beside its parameters, and draws random numbers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(7, 13)
            self.norm = L.BatchNormalization(13)
            self.l2 = L.Linear(13, 3)
        # Of two normal numbers that are made at once, one is kept: whenever a step is saved, here.
        self.draw()

    def draw(self) -> np.float32:
        return np.float32(random.gauss(1, 0.1) * np.random.normal(1, 0.1))

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        x = x * self.draw()
        h = F.dropout(F.tanh(self.norm(self.l1(x))), 0.3)
        loss = F.softmax_cross_entropy(self.l2(h), y)
        chainer.report({"loss": loss}, self)
        return loss


def examples_of(count: int) -> list[Any]:
    """Those of this rank."""
    rng = np.random.RandomState(5)
    xs, ys = rng.standard_normal((count, 7)).astype("f"), rng.randint(0, 3, count).astype("i")
    return list(zip(xs[rank :: comm.size], ys[rank :: comm.size], strict=True))


class Trouble(Extension):
    """Comes after the checkpoint."""

    priority = -200

    def __init__(self, training: Training, checkpoint: Any) -> None:
        assert training.trouble is not None
        self.iteration, self.ranks, self.what = training.trouble
        self.checkpoint = checkpoint

    def __call__(self, trainer: Trainer) -> None:
        if trainer.updater.iteration == self.iteration:
            if self.what == "fill":
                self.checkpoint._saver.wait()
            if rank in self.ranks:
                getattr(self, self.what)()

    def fail(self) -> None:
        raise ZeroDivisionError("this is the original message")

    def interrupt(self) -> None:
        raise KeyboardInterrupt("this is the original message")

    def terminate(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def tell(self) -> None:
        assert self.checkpoint._saver.saving is not None
        report(rank, event="in flight", pid=os.getpid())

    def fill(self) -> None:
        """Fills the file system but for less than a step takes."""
        disks.fill(self.checkpoint._saver.directory.parent, free=16384)


class Workers(Extension):
    """Reads the examples as an evaluation does, with new workers, while a step is being saved."""

    priority = -200

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples
        self.forked = threading.Event()
        os.register_at_fork(after_in_parent=self.forked.set)
        self.write = saving.write_shard
        saving.write_shard = self.wait_for_a_fork

    def wait_for_a_fork(self, *arguments: Any) -> Any:
        """In place of the first writing of a shard."""
        saving.write_shard = self.write
        self.forked.clear()
        assert self.forked.wait(30)
        return self.write(*arguments)

    def __call__(self, trainer: Trainer) -> None:
        iterator = MultiprocessIterator(
            self.examples, 4, repeat=False, shuffle=False, n_processes=2, shared_mem=1000
        )
        assert sum(map(len, iterator)) == len(self.examples)
        iterator.finalize()


def digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(b"".join(np.asarray(value).tobytes() for value in values)).hexdigest()


def facts(trainer: Trainer) -> dict[str, Any]:
    optimizer = trainer.updater.get_optimizer("main")
    iterator = trainer.updater.get_iterator("main")
    params = [param for _, param in sorted(optimizer.target.namedparams())]
    norm = optimizer.target.norm
    groups = optimizer.sharded_model.sharded_groups
    found = {
        "t": optimizer.t,
        "epoch": optimizer.epoch,
        "iteration": trainer.updater.iteration,
        "scale": optimizer._loss_scale,
        "rules": [param.update_rule.t for param in params],
        "parameters": digest(param.array for param in params),
        "persistent": digest([norm.avg_mean, norm.avg_var]),
        "states": digest(values for update in groups for values in update.states.values()),
        "position": [iterator.epoch, iterator.current_position, iterator.epoch_detail],
        "before": iterator.previous_epoch_detail,
        "order": iterator._state.order.tolist(),
        "random": [np.random.standard_normal(), random.gauss(0, 1)],
        "stalled": False,
        "log": None,
    }
    if rank == 0:
        log = trainer.get_extension("LogReport").log
        found["stalled"] = any("checkpoint/stalled_s" in entry for entry in log)
        time = ("elapsed_time", "checkpoint/stalled_s", "checkpoint/waited_s")
        found["log"] = [{k: v for k, v in entry.items() if k not in time} for entry in log]
    return found


def make(training: Training) -> tuple[Trainer, Any]:
    np.random.seed(rank)
    random.seed(rank)
    examples = examples_of(training.examples)
    optimizer = smorms3_dist.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(lr=0.01), comm
    ).setup(Net())
    optimizer.loss_scaling(interval=2)
    trainer = Trainer(
        StandardUpdater(SerialIterator(examples, 4), optimizer),
        (training.until, "iteration"),
        sys.argv[1],
    )
    if rank == 0:
        trainer.extend(extensions.LogReport(trigger=(3, "iteration")))
        if training.extra:
            extra = type("Extra", (Extension,), {"serialize": lambda self, into: into("state", 0)})
            trainer.extend(extra(), trigger=lambda trainer: False)
    checkpoint = None
    if training.directories:
        checkpoint = smorms3_dist.ShardedCheckpoint(
            training.directories[rank % len(training.directories)],
            keep_last=2,
            every=(2, "iteration"),
        )
        trainer.extend(checkpoint)
    if training.workers:
        trainer.extend(Workers(examples), trigger=(1, "iteration"))
    if training.trouble is not None:
        trainer.extend(Trouble(training, checkpoint), trigger=(1, "iteration"))
    return trainer, checkpoint


def run(training: Training) -> None:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("smorms3_dist").addHandler(handler)
    if training.hosts is not None:
        socket.gethostname = lambda: training.hosts[rank]
        manifest_json.now = lambda: f"2026-01-01T00:00:{rank:02d}Z"
    if rank in training.blocked:
        saving.write_shard = lambda *arguments: threading.Event().wait()
    if training.dies:
        die_at(training.dies)
    saving._PATIENCE_S = 0.2
    step = None
    try:
        trainer, checkpoint = make(training)
        if checkpoint is not None:
            before = np.random.get_state(), random.getstate()
            np.random.seed(77)
            random.seed(78)
            step = checkpoint.maybe_load(trainer)
            if step is None:
                # As if it had never been asked.
                np.random.set_state(before[0])
                random.setstate(before[1])
        position = trainer.updater.epoch_detail
        report(rank, event="start", name=training.name, step=step, position=position)
        try:
            if training.handled:
                raise BlockingIOError("of something before")
        except BlockingIOError:
            trainer.run()
        else:
            trainer.run()
    except smorms3_dist.CheckpointError as error:
        if not training.error:
            raise
        report(rank, event="error", name=training.name, step=step, error=str(error), said=said)
    else:
        report(rank, event="end", name=training.name, said=said, **facts(trainer))
    finally:
        logging.getLogger("smorms3_dist").removeHandler(handler)


def save_many(path: str, communicator: Any) -> int:
    """Returns how many bytes more updates take with saves between them, but for the first save.

    Parameters and states are 10 MB on all ranks together.
    """
    link = chainer.Link()
    with link.init_scope():
        link.W = chainer.Parameter(np.zeros((500, 1250), np.float32))
    link.W.grad = np.ones_like(link.W.array)
    optimizer = smorms3_dist.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(), communicator
    ).setup(link)
    tracemalloc.start()

    def peak(saves: bool) -> int:
        tracemalloc.reset_peak()
        for step in range(1, 6):
            if saves:
                saver = smorms3_dist.save_checkpoint(
                    path, optimizer, step=step, keep_last=1, asynchronous=True
                )
            for _ in range(2):
                optimizer.update()
        if saves:
            saver.wait()
        return tracemalloc.get_traced_memory()[1]

    for _ in range(2):
        # The first one only broadcasts parameters: there are no states to be copied yet.
        optimizer.update()
    smorms3_dist.save_checkpoint(path, optimizer, step=0, asynchronous=True).wait()
    return -peak(False) + peak(True)


def measure(training: Training) -> None:
    """Reports how much memory many saves take."""
    communicator = comm
    if training.large == "interface":
        # ChainerMN's communicator interface without an MPI communicator behind it.
        names = ("rank", "size", *REQUIRED_METHODS)
        communicator = types.SimpleNamespace(**{name: getattr(comm, name) for name in names})
    warnings.filterwarnings("ignore", "chainermn.* is experimental", FutureWarning)
    growth = save_many(training.directories[0], communicator)
    report(rank, event="growth", name=training.name, bytes=growth)


def be_rank(communicator: Any, training: Training) -> None:
    global comm, rank
    comm, rank = communicator, communicator.rank
    (measure if training.large else run)(training)


def main(arguments: list[str]) -> None:
    ranks = 0
    if arguments[0] == "--fork":
        ranks, arguments = int(arguments[1]), arguments[2:]
    else:
        import chainermn

        communicator = chainermn.create_communicator("naive")
    for argument in arguments:
        training = Training(**json.loads(argument))
        if not ranks:
            be_rank(communicator, training)
            continue
        ended = run_forked(ranks, lambda communicator, t=training: be_rank(communicator, t))
        if training.keep:
            shutil.copytree(training.directories[0], training.keep)
        if set(ended) != {-signal.SIGKILL if training.dies else 0}:
            raise SystemExit(f"{training} ended with {ended}")


main(sys.argv[2:])
