"""An update of many small parameters, beside one of a single array of their size.

    mpirun -n 2 python -m benchmarks.small [--parameters N] [--rule NAME] [--steps N]

What differs is Python's work for each parameter. On one rank Chainer's own optimizer takes its turn
as well. All take turns in the same processes; medians of rank 0.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import smorms3_dist

import chainer
import chainermn
import numpy as np
from mpi4py import MPI


class Model(chainer.Link):
    """Parameters of given sizes."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        with self.init_scope():
            for index, size in enumerate(sizes):
                setattr(self, f"p{index}", chainer.Parameter(np.ones(size, np.float32)))


def update_of(optimizer: Any, sizes: list[int]) -> Callable[[], float]:
    """Returns what makes an update of a model and tells the seconds that it took."""
    params = list(optimizer.setup(Model(sizes)).target.params())
    gradients = [np.full(param.shape, 1e-3, np.float32) for param in params]

    def update() -> float:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        MPI.COMM_WORLD.Barrier()
        start = time.perf_counter()
        optimizer.update()
        return time.perf_counter() - start

    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=200, help="of 1 to 2000 elements")
    parser.add_argument("--rule", default="SMORMS3", help="one of chainer.optimizers")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    sizes = np.random.RandomState(0).randint(1, 2001, options.parameters).tolist()
    comm = chainermn.create_communicator("naive")

    def sharded() -> Any:
        rule = getattr(chainer.optimizers, options.rule)()
        return smorms3_dist.create_multi_node_optimizer(rule, comm)

    updates = {
        f"{len(sizes)} parameters": update_of(sharded(), sizes),
        "one array": update_of(sharded(), [sum(sizes)]),
    }
    if comm.size == 1:
        updates["plain Chainer"] = update_of(getattr(chainer.optimizers, options.rule)(), sizes)
    times: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(options.steps):
        for name, update in updates.items():
            times[name].append(update())
    if comm.rank == 0:
        load = os.getloadavg()[0]
        print(f"{sum(sizes):,} elements, {comm.size} ranks, load average {load:.1f}")
        one = statistics.median(times["one array"])
        for name, each in times.items():
            median = statistics.median(each)
            print(f"{name:18} {median * 1e6:8.0f} microseconds {median / one:6.2f}")


if __name__ == "__main__":
    main()
