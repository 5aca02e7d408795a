"""Peak memory of a GPU in training steps, with this project's optimizer or ChainerMN's pure_nccl.

Run by mpirun, one GPU a rank. First a tiny model is trained, which loads all the code that is
needed; what is left of the GPU's memory then is the base. The model has no layers: its parameters
are many arrays of mixed sizes, and each step is given new gradients, array after array, as a
backward pass would make them. So parameters, gradients, states and buffers are all that there is.

Three numbers are kept, of each the largest over time: what is in use of CuPy's memory pool, what
the pool has taken from the device, and what is gone from the device (NCCL's own memory, too; and
that of other processes, which there should not be). They are stored for making the optimizer, up
to the broadcast of its first update, and for the steps that follow.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Callable
from typing import Any

import smorms3_dist
from smorms3_dist.bench import clock

import chainer
import chainermn
import cupy
import numpy as np
from mpi4py import MPI

ARRAYS = 200

SYSTEMS: dict[str, Callable[[MPI.Intracomm], Any]] = {
    "smorms3_dist": lambda comm: smorms3_dist.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(), comm
    ),
    "pure_nccl": lambda comm: chainermn.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(), chainermn.create_communicator("pure_nccl", comm)
    ),
}


class Peak(cupy.cuda.MemoryHook):
    """Keeps the largest numbers of bytes since the last `take`, by how they are counted."""

    name = "peak"

    def __init__(self) -> None:
        self._pool = cupy.get_default_memory_pool()
        self._base = self._now()
        self._most = dict(self._base)

    def _now(self) -> dict[str, int]:
        free, all_of_it = cupy.cuda.runtime.memGetInfo()
        return {
            "in_use": self._pool.used_bytes(),
            "pool": self._pool.total_bytes(),
            "device": all_of_it - free,
        }

    def malloc_postprocess(self, **_: Any) -> None:
        """Called by CuPy when memory of the pool has been given to an array."""
        now = self._now()
        self._most = {key: max(most, now[key]) for key, most in self._most.items()}

    def take(self) -> dict[str, int]:
        """Returns the largest numbers, over those at the start, and begins again."""
        self.malloc_postprocess()
        peak = {key: most - self._base[key] for key, most in self._most.items()}
        self._most = self._now()
        return peak


def sizes(parameters: int) -> list[int]:
    """Sizes of arrays, from small to very large, which make up about so many parameters."""
    weights = 10.0 ** np.random.RandomState(0).uniform(0, 4, ARRAYS)
    return [max(1, int(size)) for size in weights * (parameters / weights.sum())]


def train(system: str, comm: MPI.Intracomm, parameters: int, steps: int) -> dict[str, Any]:
    """Trains a model on the current GPU and returns what memory that took, of this rank."""
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    with Peak() as peak:
        model = chainer.Link()
        with model.init_scope():
            for index, size in enumerate(sizes(parameters)):
                setattr(model, f"p{index}", chainer.Parameter(np.float32(0), size))
        # Made on the host: a parameter that is given an array on the GPU keeps that, too.
        model.to_device(f"@cupy:{cupy.cuda.Device().id}")
        optimizer = SYSTEMS[system](comm).setup(model)
        # The first update broadcasts the parameters of rank 0 and takes no step.
        optimizer.update()
        set_up = peak.take()
        for _ in range(steps):
            model.cleargrads()
            for param in model.params():
                param.grad = cupy.zeros_like(param.array)
            optimizer.update()
        cupy.cuda.Device().synchronize()
        return {
            "parameters": sum(param.size for param in model.params()),
            "set_up": set_up,
            "steps": peak.take(),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--limit", type=int, required=True, help="seconds this process may live")
    parser.add_argument("--result", required=True, help="file for rank 0 to write")
    options = parser.parse_args()
    clock.end_after(options.limit)
    comm = MPI.COMM_WORLD
    smorms3_dist.use_gpu(comm)
    train(options.system, comm, 10_000, steps=2)
    ranks = comm.gather(train(options.system, comm, options.parameters, options.steps))
    if comm.rank == 0:
        with open(options.result, "w") as file:
            json.dump({"ranks": ranks, "Python": platform.python_version()}, file)


if __name__ == "__main__":
    main()
