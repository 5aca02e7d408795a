"""Trains with a Trainer on MPI ranks and saves sharded checkpoints, in whatever trouble.

    checkpoints.py OUT [--fork RANKS] JSON...

Each JSON object is a training of its own, made anew and run after the one before: the fields of
`Training`. Every rank reports where it has gone on, and in the end everything that there is to know
of it; or the error, where one is expected. With ``--fork``, each training has forked ranks of its
own, without MPI, and may die.
"""

from __future__ import annotations

import dataclasses
import functools
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
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import smorms3_dist
from smorms3_dist.checkpoint import saving
from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.collectives.chainermn import REQUIRED_METHODS
from smorms3_dist.kernels import reference, selection

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.iterators import MultiprocessIterator, SerialIterator
from chainer.training import Extension, Trainer, extensions
from chainer.training.updaters import StandardUpdater
from forked import run_forked
from mpirun import report
from rank_threads import run_ranks
from stages import die_at

# To load the compiled one takes longer than these trainings do; the results are the same.
selection.select_kernel = lambda dtype, rank=0: reference.smorms3

ENDS = ("fail", "interrupt", "terminate", "kill")
"""The troubles after which no training goes on."""

comm: Any = None
rank = -1


@dataclasses.dataclass
class Training:
    """What to do.

    Attributes:
        name: Comes with the reports.
        directories: That of each rank; if there is one, it is that of all; if none, nothing is
            saved.
        hosts: What each rank says its host is. Their clocks differ, too.
        until: The last iteration.
        load: Whether to go on from what is there.
        keep_last: How many steps to keep.
        asynchronous: Whether to write in the background.
        examples: How many there are for all ranks together.
        workers: Whether other processes, new ones after each iteration, read examples, too.
        blocked: The ranks that never come to an end when they write a shard.
        trouble: What happens after an iteration: its number, the ranks, and what.
        error: Whether an error is expected, and reported.
        extra: Whether rank 0 has one more extension.
        handled: Whether it runs while an exception is being handled.
        patience: Seconds that a job which ends anyway waits for the disk.
        dies: The stage at which a rank is killed, as `stages.die_at` takes it.
        keep: Where the first directory is copied to after the end.
        large: If not empty, many saves of a larger model are made instead, over these collectives.
    """

    name: str = ""
    directories: list[str] = dataclasses.field(default_factory=list)
    hosts: list[str] | None = None
    until: int = 10
    load: bool = True
    keep_last: int = 2
    asynchronous: bool = True
    examples: int = 36
    workers: bool = False
    blocked: list[int] = dataclasses.field(default_factory=list)
    trouble: tuple[int, list[int], str] | None = None
    error: bool = False
    extra: bool = False
    handled: bool = False
    patience: float = 0.2
    dies: str = ""
    keep: str = ""
    large: str = ""


class Net(chainer.Chain):
    """Has values beside its parameters, and draws random numbers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(7, 13)
            self.norm = L.BatchNormalization(13)
            self.l2 = L.Linear(13, 3)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        x = x * np.float32(random.uniform(0.9, 1.1))
        h = F.dropout(F.tanh(self.norm(self.l1(x))), 0.3)
        loss = F.softmax_cross_entropy(self.l2(h), y)
        chainer.report({"loss": loss}, self)
        return loss


class Examples(chainer.dataset.DatasetMixin):
    """Those of this rank; each notes whether who gets it has the lock of a directory open."""

    def __init__(self, count: int) -> None:
        rng = np.random.RandomState(5)
        xs, ys = rng.standard_normal((count, 7)).astype("f"), rng.randint(0, 3, count).astype("i")
        self.pairs = list(zip(xs[rank :: comm.size], ys[rank :: comm.size], strict=True))
        self.parent = os.getpid()

    def __len__(self) -> int:
        return len(self.pairs)

    def get_example(self, i: int) -> Any:
        if os.getpid() != self.parent:
            mine = Path("/proc/self/fd")
            held = [os.readlink(fd) for fd in mine.iterdir() if fd.exists()]
            assert not [path for path in held if path.endswith(".lock")], held
        return self.pairs[i]


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
        place = self.checkpoint._saver.directory.parent
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        (place / "filler").write_bytes(bytes(free - 16384))


class Workers(Extension):
    """Reads the examples as an evaluation does, with new workers, while a step is being saved."""

    priority = -200

    def __init__(self, examples: Examples) -> None:
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


class Extra(Extension):
    """Has a state."""

    def serialize(self, serializer: Any) -> None:
        serializer("state", 0)


class Said(logging.Handler):
    """Keeps what this rank's log says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(b"".join(np.asarray(value).tobytes() for value in values)).hexdigest()


def facts(trainer: Trainer) -> dict[str, Any]:
    optimizer, iterator = (
        trainer.updater.get_optimizer("main"),
        trainer.updater.get_iterator("main"),
    )
    params = [param for _, param in sorted(optimizer.target.namedparams())]
    norm = optimizer.target.norm
    found = {
        "t": optimizer.t,
        "epoch": optimizer.epoch,
        "iteration": trainer.updater.iteration,
        "scale": optimizer._loss_scale,
        "rules": [param.update_rule.t for param in params],
        "parameters": digest(param.array for param in params),
        "persistent": digest([norm.avg_mean, norm.avg_var]),
        "states": digest(
            values
            for update in optimizer.sharded_model.sharded_groups
            for values in update.states.values()
        ),
        "position": [iterator.epoch, iterator.current_position, iterator.epoch_detail],
        "before": iterator.previous_epoch_detail,
        "order": iterator._state.order.tolist(),
        "random": [digest([np.random.get_state()[1]]), random.random()],
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
    examples = Examples(training.examples)
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
            trainer.extend(Extra(), trigger=lambda trainer: False)
    checkpoint = None
    if training.directories:
        checkpoint = smorms3_dist.ShardedCheckpoint(
            training.directories[rank % len(training.directories)],
            keep_last=training.keep_last,
            every=(2, "iteration"),
            asynchronous=training.asynchronous,
        )
        trainer.extend(checkpoint)
    if training.workers:
        trainer.extend(Workers(examples), trigger=(1, "iteration"))
    if training.trouble is not None:
        trainer.extend(Trouble(training, checkpoint), trigger=(1, "iteration"))
    return trainer, checkpoint


def resume(trainer: Trainer, checkpoint: Any) -> int | None:
    """Goes on with nothing but what the checkpoint has, or starts as if it had never been asked."""
    before = np.random.get_state(), random.getstate()
    np.random.seed(77)
    random.seed(78)
    step = checkpoint.maybe_load(trainer)
    if step is None:
        np.random.set_state(before[0])
        random.setstate(before[1])
    return step


def run(training: Training) -> None:
    said = Said()
    logging.getLogger("smorms3_dist").addHandler(said)
    if training.hosts is not None:
        socket.gethostname = lambda: training.hosts[rank]
        manifest_json.now = lambda: f"2026-01-01T00:00:{rank:02d}Z"
    if training.blocked:
        block(training.blocked)
    if training.dies:
        die_at(training.dies)
    saving._PATIENCE_S = training.patience
    step = None
    try:
        trainer, checkpoint = make(training)
        if training.load and checkpoint is not None:
            step = resume(trainer, checkpoint)
        position = trainer.updater.epoch_detail
        report(rank, event="start", name=training.name, step=step, position=position)
        if training.handled:
            try:
                raise RuntimeError("of something before")
            except RuntimeError:
                trainer.run()
        else:
            trainer.run()
    except smorms3_dist.CheckpointError as error:
        if not training.error:
            raise
        report(
            rank, event="error", name=training.name, step=step, error=str(error), said=said.messages
        )
    else:
        report(rank, event="end", name=training.name, said=said.messages, **facts(trainer))
    finally:
        logging.getLogger("smorms3_dist").removeHandler(said)


def block(ranks: list[int]) -> None:
    write = saving.write_shard

    def blocked(*arguments: Any) -> Any:
        if rank in ranks:
            threading.Event().wait()
        return write(*arguments)

    saving.write_shard = blocked


class InterfaceOnly:
    """ChainerMN's communicator interface without an MPI communicator behind it."""

    def __init__(self, communicator: Any) -> None:
        self.rank, self.size = communicator.rank, communicator.size
        for name in REQUIRED_METHODS:
            setattr(self, name, getattr(communicator, name))


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

    optimizer.update()
    smorms3_dist.save_checkpoint(path, optimizer, step=0, asynchronous=True).wait()
    return -peak(False) + peak(True)


def measure(training: Training) -> None:
    """Reports how much memory many saves take."""
    (path,) = training.directories
    if training.large == "threads":
        # One rank: memory is that of the process.
        growth = 0 if rank else run_ranks(1, functools.partial(save_many, path))[0]
    else:
        warnings.filterwarnings("ignore", "chainermn.* is experimental", FutureWarning)
        growth = save_many(path, comm if training.large == "mpi" else InterfaceOnly(comm))
    report(rank, event="growth", name=training.name, bytes=growth)


def be_rank(communicator: Any, training: Training) -> None:
    global comm, rank
    comm, rank = communicator, communicator.rank
    if training.large:
        measure(training)
    else:
        run(training)


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
        harmed = training.trouble is not None and training.trouble[2] in ENDS
        if 0 in ended if harmed else set(ended) != {-signal.SIGKILL if training.dies else 0}:
            raise SystemExit(f"{training} ended with {ended}")


main(sys.argv[2:])
