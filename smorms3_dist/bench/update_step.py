"""Program: optimizer and communication of a step, with this project's optimizer or another one.

The timed phase is one ``optimizer.update()`` on gradients that are there already. A sharded step
drops the gradients, where with the other systems the next pass does so: they are held until the
clock has stopped, so that giving back their memory is timed with none.
"""

from __future__ import annotations

import argparse
import collections
from typing import Any, ClassVar

from smorms3_dist.bench import clock, ranks_of_mpi
from smorms3_dist.bench.workloads import BATCH, WORKLOADS, Workload
from smorms3_dist.optimizer.factory import create_multi_node_optimizer
from smorms3_dist.optimizer.optimizer import ShardedOptimizer
from smorms3_dist.optimizer.options import read_options
from smorms3_dist.report.meter import StepMeter

import chainer
import chainer.functions as F
import chainermn
import numpy as np

HOOKS = {
    "WeightDecay": lambda: chainer.optimizer_hooks.WeightDecay(1e-4),
    "GradientClipping": lambda: chainer.optimizer_hooks.GradientClipping(1.0),
    "GradientLARS": chainer.optimizer_hooks.GradientLARS,
}


class ChainerSystem:
    """See `smorms3_dist.bench.clock.System`."""

    signs: ClassVar[dict[str, int]] = {"update": 1}

    def __init__(
        self,
        options: argparse.Namespace,
        workload: Workload,
        communicator: chainermn.CommunicatorBase,
    ) -> None:
        self._options = options
        self._communicator = communicator
        self._workload = workload
        random = np.random.default_rng(0)
        self._model = chainer.Link()
        with self._model.init_scope():
            for index, shape in enumerate(workload.shapes):
                values = random.standard_normal(shape, np.float32)
                values *= np.float32((2 / shape[-1]) ** 0.5)
                setattr(self._model, f"p{index:04}", chainer.Parameter(values))
        self._params = list(self._model.params())
        random = np.random.default_rng(1 + communicator.rank)
        self._input = random.standard_normal((BATCH, *workload.widths[:1]), np.float32)

    def forward_backward(self) -> None:
        """See `smorms3_dist.bench.clock.System`."""
        self._model.cleargrads()
        if self._workload.vectors:
            for param in self._params:
                param.grad = np.full(param.shape, 1e-3, np.float32)
            return
        layers = iter(self._params)
        output: Any = self._input
        for weights in layers:
            output = F.relu(
                F.linear(output, weights, next(layers) if self._workload.bias else None)
            )
        F.sum(output * output).backward()

    def set_up(self) -> None:
        """See `smorms3_dist.bench.clock.System`."""
        optimizer = getattr(chainer.optimizers, self._options.rule)()
        if self._options.system == "smorms3_dist":
            more = read_options(",".join(self._options.option))
            optimizer = create_multi_node_optimizer(optimizer, self._communicator, **more)
        elif self._options.system == "chainermn":
            optimizer = chainermn.create_multi_node_optimizer(optimizer, self._communicator)
        self.optimizer = optimizer.setup(self._model)
        for name in self._options.hooks:
            self.optimizer.add_hook(HOOKS[name]())
        # The first update of several ranks broadcasts parameters and takes no step.
        self.optimizer.update()

    def step(self, timed: clock.Timed, phase: str = "update") -> None:
        """See `smorms3_dist.bench.clock.System`."""
        self.forward_backward()
        gradients = [param.grad for param in self._params]
        timed(phase, self.optimizer.update)
        del gradients

    def state_bytes(self) -> int:
        """See `smorms3_dist.bench.clock.System`."""
        if isinstance(self.optimizer, ShardedOptimizer):
            return self.optimizer.state_bytes()
        states = (param.update_rule.state.values() for param in self._params)
        return sum(
            value.nbytes for values in states for value in values if isinstance(value, np.ndarray)
        )


def main() -> None:
    """Measures, as one of the ranks that mpirun has started."""
    parser = clock.arguments()
    add = parser.add_argument
    add("--system", choices=("smorms3_dist", "chainermn", "chainer"), required=True)
    add("--workload", choices=WORKLOADS, required=True)
    add("--rule", default="SMORMS3", help="one of chainer.optimizers")
    add("--hooks", nargs="*", choices=HOOKS, default=[])
    add("--option", action="append", metavar="NAME=WORD", default=[], help="of ours")
    more = parser.add_mutually_exclusive_group()
    check = "time optimizer.check_sync() as well"
    more.add_argument("--check-sync", action="store_true", help=check)
    recorded = "time a step that is recorded as well, as for StepReport and timelines, and a report"
    more.add_argument("--recorded", action="store_true", help=recorded)
    as_one = "time a step of one array of the same size as well"
    more.add_argument("--as-one", action="store_true", help=as_one)
    shared = "time a step with share_parameters=True as well"
    more.add_argument("--shared", action="store_true", help=shared)
    options = parser.parse_args()
    clock.end_after(options.limit)
    communicator = ranks_of_mpi.communicator(options.ranks)
    ranks = ranks_of_mpi.ranks(communicator)

    def check_sync(system: Any, timed: clock.Timed) -> None:
        timed("check_sync", system.optimizer.check_sync)

    def record(system: Any, timed: clock.Timed) -> None:
        phases = system.optimizer.phases
        meter, phases.spans = StepMeter(system.optimizer), collections.deque()
        system.forward_backward()
        timed("recorded", system.optimizer.update)
        timed("report", meter.read)
        phases.on, phases.spans = False, None

    made: list[ChainerSystem] = []

    def step_of(other: argparse.Namespace, workload: Workload, phase: str) -> Any:
        def step(system: ChainerSystem, timed: clock.Timed) -> None:
            if not made:
                made.append(ChainerSystem(other, workload, communicator))
                made[0].forward_backward()
                made[0].set_up()
                for _ in range(clock.WARM_UP_STEPS):
                    made[0].step(clock.Clock(ranks))
            made[0].step(timed, phase)

        return step

    extra: Any = check_sync if options.check_sync else record if options.recorded else None
    same = WORKLOADS[options.workload]
    if options.as_one:
        extra = step_of(options, Workload("one array", vectors=(same.size,)), "as one")
    if options.shared:
        words = [*options.option, "share_parameters=true"]
        sharing = argparse.Namespace(**{**vars(options), "option": words})
        extra = step_of(sharing, same, "shared")
    clock.measure(
        lambda workload: ChainerSystem(options, workload, communicator),
        ranks,
        options,
        ranks_of_mpi.versions(),
        extra,
    )


if __name__ == "__main__":
    main()
