"""The same models in PyTorch: DistributedDataParallel over gloo, with ZeroRedundancyOptimizer.

PyTorch has no SMORMS3: the optimizer is Adam, in its fused form where this build of PyTorch has
that. Adam has 2 states, where SMORMS3 has 3, so it moves and keeps less; with ``--amsgrad`` it has
3 as well, and moves and keeps as many bytes. DDP and ZeroRedundancyOptimizer are as a user gets
them, without options.

DDP communicates within the backward pass. What is timed is therefore ``optimizer.step()``, plus the
backward pass, less the same pass without communication (``no_sync``), taken in turn.
"""

from __future__ import annotations

import argparse
import itertools

from benchmarks.peers import gloo
from smorms3_dist.bench import clock
from smorms3_dist.bench.workloads import BATCH, WORKLOADS, Workload

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


class Vectors(torch.nn.Module):
    """Parameters whose gradients are ones."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.vectors = torch.nn.ParameterList(torch.full((size,), 0.1) for size in sizes)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return torch.stack([vector.sum() for vector in self.vectors])


class TorchSystem:
    """See `smorms3_dist.bench.clock.System`."""

    signs = {"backward": 1, "backward_alone": -1, "step": 1}  # noqa: RUF012

    def __init__(self, workload: Workload, rank: int, **adam: bool) -> None:
        self._adam = adam
        self._of_vectors = bool(workload.vectors)
        torch.manual_seed(0)
        layers: list[torch.nn.Module] = []
        for n_in, n_out in itertools.pairwise(workload.widths):
            layers += [torch.nn.Linear(n_in, n_out, workload.bias), torch.nn.ReLU()]
        self._model: torch.nn.Module = torch.nn.Sequential(*layers)
        if workload.vectors:
            self._model = Vectors(workload.vectors)
        torch.manual_seed(1 + rank)
        self._input = torch.randn(BATCH, *workload.widths[:1])

    def _loss(self) -> torch.Tensor:
        output = self._model(self._input)
        return output.sum() if self._of_vectors else output.square().sum()

    def forward_backward(self) -> None:
        self._loss().backward()

    def set_up(self) -> None:
        self._model = DistributedDataParallel(self._model)
        self._optimizer = ZeroRedundancyOptimizer(
            self._model.parameters(),
            optimizer_class=torch.optim.Adam,
            lr=1e-3,
            **self._adam,
        )

    def step(self, timed: clock.Timed) -> None:
        self._optimizer.zero_grad()
        with self._model.no_sync():
            loss = self._loss()
            timed("backward_alone", loss.backward)
        self._optimizer.zero_grad()
        loss = self._loss()
        timed("backward", loss.backward)
        timed("step", self._optimizer.step)

    def state_bytes(self) -> int:
        states = self._optimizer.optim.state.values()
        return sum(
            value.nbytes for state in states for value in state.values() if torch.is_tensor(value)
        )


def can_fuse() -> bool:
    """Whether this build of PyTorch has a fused Adam for CPUs."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    try:
        torch.optim.Adam([parameter], fused=True).step()
    except RuntimeError:
        return False
    return True


def run_rank(ranks: clock.Ranks, options: argparse.Namespace) -> None:
    """Measures as one of the ranks."""
    adam = {"amsgrad": options.amsgrad} | ({"fused": True} if can_fuse() else {})
    chosen = ", ".join(f"{name}={value}" for name, value in adam.items())
    clock.measure(
        lambda workload: TorchSystem(workload, ranks.rank, **adam),
        ranks,
        options,
        {**gloo.versions(), "Adam": chosen},
    )


def main() -> None:
    parser = clock.arguments()
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--amsgrad", action="store_true", help="Adam with a third state")
    gloo.spawn(run_rank, parser.parse_args())


if __name__ == "__main__":
    main()
