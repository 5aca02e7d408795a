"""Program: the compiled CPU kernel of every rule, in one process, where arrays lie well and badly.

Each rule reads and writes the parameter and its states, and reads the gradient; memory bounds them,
so that what counts is the time a byte. *Staggered*, arrays start at different places of a page, as
in a training. *Meeting*, the parameter and the gradient start where a state does: no training has
it worse, since states are staggered wherever the other two lie. *Equal*, they all start with a
page, and fight for the same lines of the caches.
"""

from __future__ import annotations

import statistics
import time

from smorms3_dist.bench import clock
from smorms3_dist.device.memory import GRADIENTS, PARAMETERS, STATES, HostMemory
from smorms3_dist.kernels import cpu
from smorms3_dist.kernels.chainer_rules import SMORMS3, Application, application_of
from smorms3_dist.kernels.mean import Mean

import chainer
import numpy as np

RULES = (
    *("SMORMS3", "SGD", "MomentumSGD", "CorrectedMomentumSGD", "NesterovAG", "Adam", "AMSGrad"),
    *("AdaBound", "AMSBound", "MSVAG", "AdaGrad", "AdaDelta", "RMSprop", "RMSpropGraves"),
)

_STATES = range(STATES, STATES + 3)

PLACES = {
    "staggered": (PARAMETERS, GRADIENTS, *_STATES),
    "meeting": (STATES, STATES, *_STATES),
    "equal": (0,) * 5,
}
"""Where parameter, gradient and states start in a page, by placement."""


def arrays(size: int, places: tuple[int, ...]) -> list[np.ndarray]:
    """Parameters, gradients and three states of so many elements, at places of a page."""
    random = np.random.default_rng(0)
    made = [HostMemory().empty(size, np.dtype("f"), "the benchmark", at) for at in places]
    for array in made[:2]:
        random.standard_normal(dtype=np.float32, out=array)
    for index, array in enumerate(made[2:]):
        array[...] = index == 0
    return made


def _application(name: str) -> Application:
    """A rule of Chainer's in its first step."""
    rule = getattr(chainer.optimizers, name)().create_update_rule()
    rule.t = 1
    told = application_of(type(rule), rule, np.dtype("f"))
    assert told is not None
    return told


def main() -> None:
    """Measures in this process alone."""
    parser = clock.arguments()
    parser.add_argument("--elements", type=int, required=True)
    options = parser.parse_args()
    clock.end_after(options.limit)
    told = {name: _application(name) for name in RULES}
    seconds: dict[str, list[float]] = {}
    placed = {placement: arrays(options.elements, places) for placement, places in PLACES.items()}
    # The first turn compiles, and touches fresh memory.
    for turn in range(options.steps + 1):
        for placement, operands in placed.items():
            for name, (formula, constants) in told.items():
                # What one rule leaves in the states means nothing to the next; and none finds
                # memory that has not been used for a while, as other placements had their turn.
                param, grad, *states = operands
                np.add(param, grad, out=states[0])
                for state in states:
                    state[...] = formula == SMORMS3
                start = time.perf_counter()
                cpu.update(formula, param, Mean(grad), states[: len(formula.states)], constants)
                if turn > 0:
                    each = seconds.setdefault(f"{name}, {placement}", [])
                    each.append(time.perf_counter() - start)
    elements = {name: 4 * (3 + 2 * len(formula.states)) for name, (formula, _) in told.items()}
    clock.write(
        options,
        elements=options.elements,
        bytes_an_element=elements,
        seconds=seconds,
        ns_an_element={
            name: 1e9 * statistics.median(times) / options.elements
            for name, times in seconds.items()
        },
        versions={"Chainer": chainer.__version__},
    )


if __name__ == "__main__":
    main()
