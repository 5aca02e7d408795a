"""A Chainer MLP with this project's optimizer or ChainerMN's; nothing else differs.

Run by mpirun. The timed phase is one ``optimizer.update()`` on gradients that are there already.
This project's sharded step drops the gradients, where with the other systems the next pass does so:
they are held until the clock has stopped, so that giving back their memory is timed with none.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import smorms3_dist
from benchmarks.peers import measure, mpi

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np

RULES = {"SMORMS3": chainer.optimizers.SMORMS3, "Adam": chainer.optimizers.Adam}

OPTIMIZERS = {
    "smorms3_dist": smorms3_dist.create_multi_node_optimizer,
    "chainermn": chainermn.create_multi_node_optimizer,
}


class ChainerPeer:
    """See `measure.Peer`."""

    signs = {"update": 1}  # noqa: RUF012

    def __init__(
        self,
        options: argparse.Namespace,
        widths: tuple[int, ...],
        communicator: chainermn.CommunicatorBase,
    ) -> None:
        self._options = options
        self._communicator = communicator
        random = np.random.default_rng(0)
        self._model = chainer.Sequential()
        for n_in, n_out in itertools.pairwise(widths):
            weights = random.standard_normal((n_out, n_in), np.float32)
            weights *= np.float32((2 / n_in) ** 0.5)
            self._model.append(L.Linear(n_in, n_out, initialW=weights))
            self._model.append(F.relu)
        random = np.random.default_rng(1 + communicator.rank)
        self._input = random.standard_normal((measure.BATCH, widths[0]), np.float32)

    def forward_backward(self) -> None:
        output = self._model(self._input)
        loss = F.sum(output * output)
        self._model.cleargrads()
        loss.backward()

    def set_up(self) -> None:
        create = OPTIMIZERS[self._options.optimizer]
        self._optimizer = create(RULES[self._options.rule](), self._communicator)
        self._optimizer.setup(self._model)
        if self._options.hooks:
            self._optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-4))
            self._optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(1.0))
        # The first update broadcasts the parameters of rank 0 and takes no step.
        self._optimizer.update()

    def step(self, timed: Callable[[str, Callable[[], object]], None]) -> None:
        self.forward_backward()
        gradients = [param.grad for param in self._model.params()]
        timed("update", self._optimizer.update)
        del gradients

    def state_bytes(self) -> int:
        if isinstance(self._optimizer, smorms3_dist.ShardedOptimizer):
            return self._optimizer.state_bytes()
        rules = (param.update_rule for param in self._model.params())
        return sum(
            state.nbytes
            for rule in rules
            for state in rule.state.values()
            if isinstance(state, np.ndarray)
        )


def main() -> None:
    parser = measure.arguments()
    parser.add_argument("--optimizer", choices=OPTIMIZERS, required=True)
    parser.add_argument("--rule", choices=RULES, default="SMORMS3")
    parser.add_argument("--hooks", action="store_true", help="weight decay and gradient clipping")
    options = parser.parse_args()
    measure.end_after(options.limit)
    communicator = mpi.communicator(options.ranks)
    measure.measure(
        lambda widths: ChainerPeer(options, widths, communicator),
        mpi.ranks(communicator),
        options,
        mpi.versions(),
    )


if __name__ == "__main__":
    main()
