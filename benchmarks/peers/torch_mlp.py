"""The same MLP in PyTorch: DistributedDataParallel over gloo, with ZeroRedundancyOptimizer.

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
from collections.abc import Callable

from benchmarks.peers import gloo, measure

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


class TorchPeer:
    """See `measure.Peer`."""

    signs = {"backward": 1, "backward_alone": -1, "step": 1}  # noqa: RUF012

    def __init__(self, widths: tuple[int, ...], rank: int, **adam: bool) -> None:
        self._adam = adam
        torch.manual_seed(0)
        layers: list[torch.nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [torch.nn.Linear(n_in, n_out), torch.nn.ReLU()]
        self._model: torch.nn.Module = torch.nn.Sequential(*layers)
        torch.manual_seed(1 + rank)
        self._input = torch.randn(measure.BATCH, widths[0])

    def _loss(self) -> torch.Tensor:
        return self._model(self._input).square().sum()

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

    def step(self, timed: Callable[[str, Callable[[], object]], None]) -> None:
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


def run_rank(ranks: measure.Ranks, options: argparse.Namespace) -> None:
    """Measures as one of the ranks."""
    adam = {"amsgrad": options.amsgrad} | ({"fused": True} if can_fuse() else {})
    chosen = ", ".join(f"{name}={value}" for name, value in adam.items())
    measure.measure(
        lambda widths: TorchPeer(widths, ranks.rank, **adam),
        ranks,
        options,
        {**gloo.versions(), "Adam": chosen},
    )


def main() -> None:
    parser = measure.arguments()
    parser.add_argument("--amsgrad", action="store_true", help="Adam with a third state")
    gloo.spawn(run_rank, parser.parse_args())


if __name__ == "__main__":
    main()
