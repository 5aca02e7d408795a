"""Whole training steps of a ConvNet: their time, and the page faults in each.

    mpirun -n 2 python -m benchmarks.page_faults [--batchsize N] [--plain]
    SMORMS3_MALLOC=0 mpirun -n 2 python -m benchmarks.page_faults

With ``--plain`` each rank trains by itself, by Chainer's own optimizer. Medians of rank 0.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time

import smorms3_dist

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from mpi4py import MPI


class ConvNet(chainer.Chain):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(3, 32, 3, pad=1)
            self.conv2 = L.Convolution2D(32, 64, 3, pad=1)
            self.fc1 = L.Linear(64 * 8 * 8, 512)
            self.fc2 = L.Linear(512, 10)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.max_pooling_2d(F.relu(self.conv1(x)), 2)
        h = F.max_pooling_2d(F.relu(self.conv2(h)), 2)
        return self.fc2(F.relu(self.fc1(h)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batchsize", type=int, default=64)
    parser.add_argument("--plain", action="store_true", help="with Chainer's own optimizer")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    world = MPI.COMM_WORLD
    optimizer = chainer.optimizers.SMORMS3()
    if not options.plain:
        comm = chainermn.create_communicator("naive")
        optimizer = smorms3_dist.create_multi_node_optimizer(optimizer, comm)
    model = L.Classifier(ConvNet())
    optimizer.setup(model)
    x = np.random.RandomState(0).randn(options.batchsize, 3, 32, 32).astype(np.float32)
    t = np.zeros(options.batchsize, np.int32)
    seconds, faults = [], []
    for _ in range(5 + options.steps):
        world.Barrier()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        optimizer.update(model, x, t)
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    if world.rank == 0:
        size = sum(param.size for param in model.params())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{size:,} parameters, {world.size} ranks, load average {os.getloadavg()[0]:.1f}")
        step, fault = statistics.median(seconds[5:]), statistics.median(faults[5:])
        print(f"a step: {step * 1e3:.0f} ms, {fault:.0f} page faults; {peak} MiB at most")


if __name__ == "__main__":
    main()
