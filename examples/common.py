"""What the examples share: options, what rank 0 prints and draws, the comparison with ChainerMN.

A script for ChainerMN has all of this but `compare`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import smorms3_dist  # mends Chainer for today's Python and NumPy, so it comes first

# isort: split
import chainermn
import numpy as np
from chainer import training
from chainer.training import extensions

CreateOptimizer = Callable[[Any, Any], Any]
"""What makes a multi-node optimizer of an optimizer and a communicator."""


def parser(description: str, *, batchsize: int, epoch: int) -> argparse.ArgumentParser:
    """Makes a parser of the options that all examples have, with an example's own defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batchsize", "-b", type=int, default=batchsize, help="of a rank and step")
    parser.add_argument("--epoch", "-e", type=int, default=epoch, help="times through the data")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--communicator", default="naive", help="ChainerMN's")
    parser.add_argument("--gpu", "-g", action="store_true", help="train on GPUs, one for each rank")
    parser.add_argument("--out", "-o", default="result", help="directory for logs and pictures")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        default=os.environ.get("SMORMS3_CHECKPOINT_DIR"),
        help="save each epoch there, and go on from what is there; if not given, that of "
        "smorms3-dist run --checkpoint-dir",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train again with ChainerMN's optimizer and show how far the parameters differ",
    )
    return parser


def device_of(args: argparse.Namespace, comm: Any) -> str:
    """Returns the device to train on, which is this rank's own GPU where GPUs are asked for."""
    return f"@cupy:{smorms3_dist.use_gpu(comm)}" if args.gpu else "@numpy"


def report(
    trainer: training.Trainer,
    comm: Any,
    columns: Sequence[str],
    plots: Mapping[str, Sequence[str]],
    postprocess: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Lets rank 0 report for all.

    Args:
        trainer: The trainer.
        comm: ChainerMN's communicator.
        columns: The keys of the values to print at each epoch.
        plots: The keys of the values to draw, by the file's name.
        postprocess: Adds to an entry of the log.
    """
    if comm.rank != 0:
        return
    trainer.extend(extensions.LogReport(postprocess=postprocess))
    columns = ["epoch", *columns, "elapsed_time"]
    if on_terminal():
        trainer.extend(extensions.PrintReport(columns))
        trainer.extend(extensions.ProgressBar(update_interval=10))
    else:
        trainer.extend(extensions.PrintReport(columns, out=PlainLines(sys.stdout)))
    if plots and can_draw():
        for name, keys in plots.items():
            trainer.extend(extensions.PlotReport(keys, "epoch", filename=name))


def accuracy(trainer: training.Trainer) -> float:
    """Returns the validation accuracy of the last epoch; only rank 0 has it."""
    return trainer.get_extension("LogReport").log[-1]["validation/main/accuracy"]


def keep_checkpoints(trainer: training.Trainer, directory: Path | None) -> None:
    """Saves each epoch, and goes on from the newest one that is there."""
    if directory is not None:
        checkpoint = smorms3_dist.ShardedCheckpoint(directory, keep_last=2, every=(1, "epoch"))
        trainer.extend(checkpoint)
        checkpoint.maybe_load(trainer)


def compare(
    args: argparse.Namespace,
    comm: Any,
    trainer: training.Trainer,
    fit: Callable[[CreateOptimizer, str], training.Trainer],
) -> None:
    """Trains again with ChainerMN's optimizer, and shows how far the parameters differ.

    Args:
        args: The example's options.
        comm: ChainerMN's communicator.
        trainer: The trainer that has trained with a sharded optimizer.
        fit: Trains from the same seed, given what makes the optimizer, and a directory.
    """
    if comm.rank == 0:
        print("\nthe same training with ChainerMN's own optimizer:", flush=True)
    reference = fit(chainermn.create_multi_node_optimizer, os.path.join(args.out, "chainermn"))
    differences = comm.gather_obj(largest_difference(trainer, reference))
    if comm.rank == 0:
        seconds, reference_seconds = trainer.elapsed_time, reference.elapsed_time
        print(f"time: {seconds:.1f} s, with ChainerMN's optimizer {reference_seconds:.1f} s")
        print(f"largest parameter difference on any rank: {np.max(differences)}", flush=True)
        if can_draw():
            draw_both(os.path.join(args.out, "compare.png"), trainer, reference)


def largest_difference(trainer: training.Trainer, reference: training.Trainer) -> float:
    """Returns the largest difference of two elements of this rank's models."""
    pairs = zip(parameters(trainer), parameters(reference), strict=True)
    return float(np.max([float(abs(ours.array - theirs.array).max()) for ours, theirs in pairs]))


def parameters(trainer: training.Trainer) -> list[Any]:
    optimizers = trainer.updater.get_all_optimizers()
    return [param for name in sorted(optimizers) for param in optimizers[name].target.params()]


def draw_both(path: str, trainer: training.Trainer, reference: training.Trainer) -> None:
    """Draws the losses of two trainings over each other, the second one's broad and pale."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    logs = [each.get_extension("LogReport").log for each in (reference, trainer)]
    styles: list[Any] = [{"linewidth": 6, "alpha": 0.35}, {"linewidth": 1.2, "marker": "."}]
    for log, style, name in zip(logs, styles, ["ChainerMN", "smorms3_dist"], strict=True):
        keys = sorted({key for entry in log for key in entry if "loss" in key.rsplit("/", 1)[-1]})
        for index, key in enumerate(keys):
            points = [(entry["iteration"], entry[key]) for entry in log if key in entry]
            axes.plot(
                *zip(*points, strict=True), color=f"C{index}", label=f"{key}, {name}", **style
            )
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


@functools.cache
def can_draw() -> bool:
    """Tells whether matplotlib is there, and keeps it from looking for a screen."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (pip install matplotlib)", flush=True)
        return False
    import matplotlib

    matplotlib.use("Agg")
    return True


def on_terminal() -> bool:
    """Tells whether a person is watching: mpirun gives ranks a terminal even if it has none."""
    launcher_output = f"/proc/{os.getppid()}/fd/1"
    if not sys.stdout.isatty():
        return False
    if "OMPI_COMM_WORLD_RANK" not in os.environ or not os.access(launcher_output, os.R_OK):
        return True
    return os.path.realpath(launcher_output).startswith(("/dev/pts/", "/dev/tty"))


class PlainLines:
    """An output for PrintReport without the escape code that it clears lines with."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text.replace("\033[J", ""))

    def flush(self) -> None:
        self._stream.flush()
