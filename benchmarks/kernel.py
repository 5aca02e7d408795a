"""The compiled CPU kernel against a loop in C with the same arithmetic, in turn, in one process.

The C compiler may use every instruction of this machine and assume that nobody looks at errno or at
floating-point exceptions, but may neither reorder nor contract: the results must be equal bit for
bit, and that is checked. Both touch 36 bytes an element, so that memory bounds them.

In turn with these, every other rule of Chainer's: each reads and writes the parameter and its
states, and reads the gradient. What counts is the time a byte, beside that of SMORMS3.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import measure
from smorms3_dist.device.memory import GRADIENTS, PARAMETERS, STATES, HostMemory
from smorms3_dist.kernels import cpu
from smorms3_dist.kernels.chainer_rules import SMORMS3, Application, application_of
from smorms3_dist.kernels.mean import Mean

import chainer
import numba
import numpy as np

ELEMENTS = 1 << 24

RULES = ("SMORMS3", "SGD", "MomentumSGD", "CorrectedMomentumSGD", "NesterovAG", "Adam", "AMSGrad")
RULES += ("AdaBound", "AMSBound", "MSVAG", "AdaGrad", "AdaDelta", "RMSprop", "RMSpropGraves")

FLAGS = "-O3 -march=native -ffp-contract=off -fno-fast-math -fno-math-errno -fno-trapping-math"

SOURCE = """
#include <math.h>
#include <stddef.h>

void smorms3(size_t size, float *restrict param, const float *restrict grad, float *restrict mem,
             float *restrict g, float *restrict g2, float lr, float eps)
{
    for (size_t i = 0; i < size; i++) {
        float r = 1.0f / (mem[i] + 1.0f);
        float keep = 1.0f - r;
        float step = r * grad[i];
        float mean = keep * g[i] + step;
        float square = keep * g2[i] + step * grad[i];
        float x = mean * mean / (square + eps);
        float bound = x < lr || x != x ? x : lr;
        param[i] -= grad[i] * bound / (sqrtf(square) + eps);
        mem[i] = 1.0f + mem[i] * (1.0f - x);
        g[i] = mean;
        g2[i] = square;
    }
}
"""

Update = Callable[..., object]


def compiler() -> str | None:
    """The C compiler of this machine, if it has one."""
    return next(
        filter(None, map(shutil.which, [os.environ.get("CC") or "cc", "gcc", "clang"])), None
    )


def compile_loop(compiler: str, directory: Path) -> Update:
    """Compiles the loop; the function takes what a kernel takes."""
    source, library = directory / "smorms3.c", directory / "smorms3.so"
    source.write_text(SOURCE)
    subprocess.run(
        [compiler, *FLAGS.split(), "-shared", "-fPIC", str(source), "-o", str(library), "-lm"],
        check=True,
        timeout=60,
    )
    function = ctypes.CDLL(str(library)).smorms3
    array = np.ctypeslib.ndpointer(np.float32, ndim=1, flags="C_CONTIGUOUS")
    function.argtypes = [ctypes.c_size_t, *[array] * 5, ctypes.c_float, ctypes.c_float]
    function.restype = None
    return lambda param, mean, states, lr, eps: function(
        param.size, param, mean.first, *states, lr, eps
    )


def arrays(count: int = 3) -> list[np.ndarray]:
    """Parameters, gradients and states, placed as in a training, as before the first step."""
    random = np.random.default_rng(0)
    places = (PARAMETERS, GRADIENTS, *range(STATES, STATES + count))
    made = [HostMemory().empty(ELEMENTS, np.dtype("f"), "the benchmark", at) for at in places]
    for array in made[:2]:
        random.standard_normal(dtype=np.float32, out=array)
    for index, array in enumerate(made[2:]):
        array[...] = count == 3 and index == 0
    return made


def smorms3(param: np.ndarray, mean: Mean, states: list[np.ndarray], lr: float, eps: float) -> None:
    cpu.update(SMORMS3, param, mean, states, (1, lr, eps))


def application(name: str) -> Application:
    """A rule of Chainer's in its first step."""
    rule = getattr(chainer.optimizers, name)().create_update_rule()
    rule.t = 1
    told = application_of(type(rule), rule, np.dtype("f"))
    assert told is not None
    return told


def seconds_of_rules(steps: int) -> dict[str, dict[str, float]]:
    """Each rule's time, and the bytes that it reads and writes of an element."""
    operands = arrays()
    told = {name: application(name) for name in RULES}
    seconds: dict[str, list[float]] = {name: [] for name in RULES}
    for step in range(steps + 1):
        for name, (formula, constants) in told.items():
            # What one rule leaves in the states means nothing to the next.
            param, grad, *states = operands
            for state in states:
                state[...] = formula == SMORMS3
            start = time.perf_counter()
            cpu.update(formula, param, Mean(grad), states[: len(formula.states)], constants)
            if step > 0:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "s": statistics.median(times),
            "bytes": 4 * (3 + 2 * len(told[name][0].states)),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    measure.end_after(options.limit)
    found = compiler()
    if found is None:
        options.result.write_text(json.dumps({"skipped": "there is no C compiler"}))
        return
    with tempfile.TemporaryDirectory() as directory:
        loops = {"kernel": smorms3, "c": compile_loop(found, Path(directory))}
        operands = {name: arrays() for name in loops}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for step in range(options.steps + 1):
            for name, loop in loops.items():
                start = time.perf_counter()
                param, grad, *states = operands[name]
                loop(param, Mean(grad), states, 1e-3, 1e-16)
                if step > 0:  # The first call compiles, and touches fresh memory.
                    seconds[name].append(time.perf_counter() - start)
    for ours, theirs in zip(operands["kernel"], operands["c"], strict=True):
        if not np.array_equal(ours, theirs):
            raise SystemExit("the kernel and the C loop give different results")
    version = subprocess.run(
        [found, "--version"], check=True, timeout=60, capture_output=True, text=True
    ).stdout.splitlines()[0]
    result: dict[str, object] = {
        f"{name}_s": statistics.median(times) for name, times in seconds.items()
    }
    versions = {"Numba": numba.__version__, "C compiler": version, "flags": FLAGS}
    rules = seconds_of_rules(options.steps)
    result |= {"elements": ELEMENTS, "rules": rules, "versions": versions}
    options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
