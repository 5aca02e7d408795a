"""Checkpoints of this project, of a model that is trained with SMORMS3. Run by mpirun.

A rank loads its part of parameters and states; parameters then go to all ranks, which is timed as a
part of loading.
"""

from __future__ import annotations

from pathlib import Path

import smorms3_dist
from benchmarks.peers import checkpoints
from smorms3_dist.bench import clock, ranks_of_mpi
from smorms3_dist.checkpoint.files.steps import step_name

import chainer
import chainermn
import numpy as np
import xxhash


class OurPeer:
    """See `checkpoints.Peer`."""

    def __init__(
        self, shapes: checkpoints.Shapes, directory: Path, communicator: chainermn.CommunicatorBase
    ) -> None:
        self._directory = directory
        self._model = chainer.Link()
        with self._model.init_scope():
            for index, shape in enumerate(shapes):
                values = np.full(shape, index % 7 + 1, np.float32)
                setattr(self._model, f"p{index}", chainer.Parameter(values))
        self._params = list(self._model.params())
        # One array is enough: a step reads gradients, and does not write to them.
        ones = np.full(max(param.size for param in self._params), 0.5, np.float32)
        self._gradients = [ones[: param.size].reshape(param.shape) for param in self._params]
        optimizer = chainer.optimizers.SMORMS3()
        self._optimizer = smorms3_dist.create_multi_node_optimizer(optimizer, communicator)
        self._optimizer.setup(self._model)
        # The first update broadcasts the parameters of rank 0 and takes no step.
        self.step()
        self.step()

    def step(self) -> None:
        for param, gradient in zip(self._params, self._gradients, strict=True):
            param.grad = gradient
        self._optimizer.update()

    def arrays(self) -> list[np.ndarray]:
        sharded = self._optimizer.sharded_model
        found = []
        for group in sharded.sharded_groups:
            for segment in group.shard.segments:
                found.append(group.buffers.flat[segment.range_f])
                found += [values[segment.range_s] for values in group.states.values()]
        return found

    def save(self, number: int) -> None:
        smorms3_dist.save_checkpoint(self._directory, self._optimizer, step=number)

    def begin_save(self, number: int) -> None:
        self._saver = smorms3_dist.save_checkpoint(
            self._directory, self._optimizer, step=number, asynchronous=True
        )

    def is_saving(self) -> bool:
        return self._saver.saving is not None

    def end_save(self) -> None:
        self._saver.wait()

    def place(self, number: int) -> Path:
        return self._directory / step_name(number)

    def load(self, path: Path) -> None:
        smorms3_dist.load_checkpoint(path, self._optimizer, step=0)

    def load_own(self, number: int) -> None:
        smorms3_dist.load_checkpoint(self._directory, self._optimizer, step=number)


def main() -> None:
    options = checkpoints.arguments().parse_args()
    clock.end_after(options.limit)
    communicator = ranks_of_mpi.communicator(options.ranks)
    checkpoints.run(
        lambda shapes, directory: OurPeer(shapes, directory, communicator),
        ranks_of_mpi.ranks(communicator),
        options,
        {**ranks_of_mpi.versions(), "xxhash": xxhash.VERSION},
    )


if __name__ == "__main__":
    main()
