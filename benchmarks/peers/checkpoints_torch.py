"""torch.distributed.checkpoint of the same parameters and states, sharded by rows over gloo.

Every array is a DTensor of which each rank has its rows, as FSDP would have it. Options are as a
user gets them, with two exceptions. The memory of copies is kept from one save in the background to
the next: otherwise each of them would allocate it anew. And saves in the background have a process
group of their own: their thread communicates, which must not meet what the training communicates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.peers import checkpoints, gloo
from smorms3_dist.bench import clock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard


class TorchPeer:
    """See `checkpoints.Peer`."""

    step = None

    def __init__(self, shapes: checkpoints.Shapes, directory: Path, ranks: int) -> None:
        self._directory = directory
        mesh = init_device_mesh("cpu", (ranks,))
        rank = mesh.get_local_rank()

        def array(shape: tuple[int, ...], value: float) -> DTensor:
            chunk = -(-shape[0] // ranks)
            rows = max(min(chunk, shape[0] - rank * chunk), 0)
            local = torch.full((rows, *shape[1:]), float(value))
            stride = tuple(torch.empty(shape, device="meta").stride())
            return DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
            )

        self._state: dict[str, Any] = {
            "model": {f"p{i}": array(shape, i % 7 + 1) for i, shape in enumerate(shapes)},
            "states": {
                f"p{i}": {f"s{k}": array(shape, i % 7 + 2 + k) for k in range(checkpoints.STATES)}
                for i, shape in enumerate(shapes)
            },
        }
        self._group = dist.new_group()
        self._stager = DefaultStager(StagingOptions(False, False, False, False))

    def _tensors(self) -> Iterator[DTensor]:
        yield from self._state["model"].values()
        for states in self._state["states"].values():
            yield from states.values()

    def arrays(self) -> list[np.ndarray]:
        return [tensor.to_local().numpy() for tensor in self._tensors()]

    def save(self, number: int) -> None:
        dcp.save(self._state, checkpoint_id=self.place(number))

    def begin_save(self, number: int) -> None:
        self._saving: Future[Any] = dcp.async_save(
            self._state,
            checkpoint_id=self.place(number),
            async_stager=self._stager,
            process_group=self._group,
        )

    def is_saving(self) -> bool:
        return not self._saving.done()

    def end_save(self) -> None:
        self._saving.result()

    def place(self, number: int) -> Path:
        return self._directory / str(number)

    def load_own(self, number: int) -> None:
        dcp.load(self._state, checkpoint_id=self.place(number))

    def load(self, directory: Path) -> None:
        dcp.load(self._state, checkpoint_id=directory / "0")


def run_rank(ranks: clock.Ranks, options: argparse.Namespace) -> None:
    """Measures as one of the ranks."""
    checkpoints.run(
        lambda shapes, directory: TorchPeer(shapes, directory, options.ranks),
        ranks,
        options,
        gloo.versions(),
    )


def main() -> None:
    gloo.spawn(run_rank, checkpoints.arguments().parse_args())


if __name__ == "__main__":
    main()
