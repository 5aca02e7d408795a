"""What check_sync, check_finite and the comparison of what ranks were told cost.

Beside a step and a memcpy of the parameters, and beside the smallest step there is: that of one
element, which is nothing but Python, the word that the ranks exchange, and two messages.

    mpirun -n 2 python -m benchmarks.checks [--size 59] [--steps N]

Everything is timed in turn, in the same processes, behind barriers; the slowest rank counts, and of
the steps the median. The optimizers hold a model of their own each.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Callable

import smorms3_dist
from benchmarks.peers.measure import WIDTHS

import chainer
import chainer.links as L
import chainermn
import numpy as np
from mpi4py import MPI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=WIDTHS, default="59")
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    world = MPI.COMM_WORLD
    comm = chainermn.create_communicator("naive")
    shapes = WIDTHS[options.size]
    optimizers = {}
    for mode in ("off", "error"):
        layers = (L.Linear(a, b) for a, b in itertools.pairwise(shapes))
        optimizers[mode] = smorms3_dist.create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), comm, check_finite=mode
        ).setup(chainer.Sequential(*layers))
    smallest = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm).setup(
        chainer.Sequential(L.Linear(1, 1, nobias=True))
    )
    word = np.zeros(1, np.int64)
    size = sum(param.size for param in optimizers["off"].target.params())
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    gradients = [np.full(p.shape, 1e-3, "f") for p in optimizers["off"].target.params()]
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], object]) -> None:
        world.Barrier()
        start = MPI.Wtime()
        function()
        slowest = world.allreduce(MPI.Wtime() - start, MPI.MAX)
        times.setdefault(name, []).append(slowest)

    def step(mode: str) -> None:
        timed(f"step, check_finite={mode}", optimizers[mode].update)

    for number in range(options.steps + 2):
        if number == 2:
            times.clear()
        for mode in optimizers:
            for param, grad in zip(optimizers[mode].target.params(), gradients, strict=True):
                param.grad = grad
            step(mode)
        timed("check_sync", optimizers["off"].check_sync)
        for param in smallest.target.params():
            param.grad = np.ones_like(param.array)
        timed("step of one element", smallest.update)
        timed("all-reduce of a word", lambda: world.Allreduce(MPI.IN_PLACE, word, MPI.BOR))
        timed("memcpy", lambda: np.copyto(target, source))
    if world.rank == 0:
        medians = {name: statistics.median(each) for name, each in times.items()}
        print(f"{size:,} parameters, {world.size} ranks, load average {os.getloadavg()[0]:.1f}")
        for name, seconds in medians.items():
            in_steps = seconds / medians["step, check_finite=off"]
            in_memcpys = seconds / medians["memcpy"]
            print(
                f"{name:25} {seconds * 1e3:7.2f} ms {in_steps:8.4f} steps {in_memcpys:7.3f} memcpys"
            )


if __name__ == "__main__":
    main()
