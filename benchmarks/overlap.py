"""Whole steps, with what is sent beside forward and backward passes, and after them.

    mpirun -n 2 python -m benchmarks.overlap [--layers N] [--units N] [--batch N] [--steps N]

Forward, backward and update of a perceptron in which all layers are alike. It counts where the
ranks are on different hosts: `benchmarks/two_hosts.sh 1gbit benchmarks.overlap` makes two of this
machine, with links of a given rate. All take turns in the same processes, several steps each, until
all parameters are there; medians of the slowest rank, for one step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import smorms3_dist
from benchmarks.turns import print_table, take_turns, where

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from mpi4py import MPI

SYSTEMS: dict[str, dict[str, Any]] = {
    "after the backward pass": {},
    "during it": {"overlap": True},
    "parameters beside the forward pass": {"overlap_gather": True},
    "both": {"overlap": True, "overlap_gather": True},
    "after it, in bfloat16": {"communication_dtype": "bfloat16"},
    "during it, in bfloat16": {"communication_dtype": "bfloat16", "overlap": True},
}


STEPS_AT_ONCE = 4
"""How many steps follow each other: what goes beside the next forward pass needs one."""


class Perceptron(chainer.ChainList):
    """So many layers of so many units."""

    def __init__(self, layers: int, units: int) -> None:
        super().__init__(*(L.Linear(units, units) for _ in range(layers)))

    def loss(self, x: Any) -> Any:
        for layer in self:
            x = F.relu(layer(x))
        return F.mean(F.square(x))


def turn_of(options: dict[str, Any], comm: Any, layers: int, x: Any) -> Callable[[], float]:
    """Returns what makes a step and tells the seconds that it takes the slowest rank."""
    rule = chainer.optimizers.SMORMS3()
    optimizer = smorms3_dist.create_multi_node_optimizer(rule, comm, **options)
    model = optimizer.setup(Perceptron(layers, x.shape[1])).target

    def turn() -> float:
        MPI.COMM_WORLD.Barrier()
        start = time.perf_counter()
        for _ in range(STEPS_AT_ONCE):
            optimizer.update(model.loss, x)
        # What is under way is part of the steps.
        for param in model.params():
            assert param.array is not None
        seconds = time.perf_counter() - start
        return MPI.COMM_WORLD.allreduce(seconds, MPI.MAX) / STEPS_AT_ONCE

    # The first step broadcasts, the next ones may learn orders.
    turn()
    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--units", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    comm = chainermn.create_communicator("naive")
    x = np.random.RandomState(comm.rank).rand(options.batch, options.units).astype(np.float32)
    turns = {name: turn_of(how, comm, options.layers, x) for name, how in SYSTEMS.items()}
    times = take_turns(turns, options.steps)
    place = where(comm)
    if comm.rank == 0:
        parameters = options.layers * options.units * (options.units + 1)
        print(f"{parameters:,} parameters, batch {options.batch}, {place}")
        print_table(times)


if __name__ == "__main__":
    main()
