"""An update with gradients and parameters sent as they are, in bfloat16, and late; and ChainerMN's.

    mpirun -n 2 python -m benchmarks.network [--parameters N] [--steps N] [--compute SECONDS]

With ``--compute`` each rank computes for so long before each update, in the place of forward and
backward, and times are of both together: double buffering reduces gradients meanwhile. It counts
where the ranks are on different hosts: `benchmarks/two_hosts.sh` makes two of this machine, with
links of a given rate. All take turns in the same processes; medians of the slowest rank.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import smorms3_dist
from benchmarks.turns import print_table, take_turns, where

import chainer
import chainermn
import numpy as np
from mpi4py import MPI

SYSTEMS: dict[str, dict[str, Any] | None] = {
    "as they are": {},
    "gradients in bfloat16": {"communication_dtype": "bfloat16"},
    "parameters as well": {"communication_dtype": "bfloat16", "gather_dtype": "bfloat16"},
    "double buffering": {"double_buffering": True},
    "late, and in bfloat16": {
        "double_buffering": True,
        "communication_dtype": "bfloat16",
        "gather_dtype": "bfloat16",
    },
    "ChainerMN, naive": None,
}


class Model(chainer.Link):
    """So many parameters, in 8 arrays of one size."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        with self.init_scope():
            for index in range(8):
                array = np.full(parameters // 8, 0.1, np.float32)
                setattr(self, f"p{index}", chainer.Parameter(array))


def compute(seconds: float) -> None:
    """Keeps a core busy as forward and backward do: in NumPy, which lets other threads run."""
    end = time.perf_counter() + seconds
    square = np.full((200, 200), 1e-3, np.float32)
    while time.perf_counter() < end:
        np.matmul(square, square)


def turn_of(
    options: dict[str, Any] | None, comm: Any, parameters: int, seconds: float
) -> Callable[[], float]:
    """Returns what makes two iterations and tells the seconds of the second on the slowest rank."""
    rule = chainer.optimizers.SMORMS3()
    if options is None:
        optimizer = chainermn.create_multi_node_optimizer(rule, comm)
    else:
        optimizer = smorms3_dist.create_multi_node_optimizer(rule, comm, **options)
    params = list(optimizer.setup(Model(parameters)).target.params())
    gradients = [np.full(param.shape, 1e-3, np.float32) for param in params]

    def iterate() -> float:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        MPI.COMM_WORLD.Barrier()
        start = time.perf_counter()
        compute(seconds)
        optimizer.update()
        return MPI.COMM_WORLD.allreduce(time.perf_counter() - start, MPI.MAX)

    def turn() -> float:
        # What is under way in the second was begun in the first, and nothing is after it.
        iterate()
        took = iterate()
        if options is not None and optimizer.in_flight is not None:
            MPI.COMM_WORLD.Barrier()
        return took

    iterate()
    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=18.9e6)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--compute", type=float, default=0.0)
    options = parser.parse_args()
    comm = chainermn.create_communicator("naive")
    parameters = int(options.parameters)
    turns = {name: turn_of(how, comm, parameters, options.compute) for name, how in SYSTEMS.items()}
    times = take_turns(turns, options.steps)
    place = where(comm)
    if comm.rank == 0:
        print(f"{parameters:,} parameters, {place}")
        print(f"each computes for {options.compute * 1e3:.0f} ms before an update, counted in")
        print_table(times)


if __name__ == "__main__":
    main()
