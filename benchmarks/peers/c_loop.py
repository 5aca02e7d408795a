"""SMORMS3 as a loop in C, which has to give the bits of the compiled kernel.

The C compiler may use every instruction of this machine and assume that nobody looks at errno or at
floating-point exceptions, but may neither reorder nor contract: the results must be equal bit for
bit, and that is checked. Both touch 36 bytes an element, so that memory bounds them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from smorms3_dist.bench import clock
from smorms3_dist.bench.rule_kernels import PLACES, arrays
from smorms3_dist.kernels import cpu
from smorms3_dist.kernels.chainer_rules import SMORMS3
from smorms3_dist.kernels.mean import Mean

import numpy as np

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

LEARNING_RATE, EPSILON = 1e-3, 1e-16


def compiler() -> str | None:
    """The C compiler of this machine, if it has one."""
    names = [os.environ.get("CC") or "cc", "gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)


def compile_loop(compiler: str, directory: Path) -> Callable[..., object]:
    """Compiles the loop; the function takes the size, the five arrays and two constants."""
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
    return function


def main() -> None:
    parser = clock.arguments()
    parser.add_argument("--elements", type=int, required=True)
    options = parser.parse_args()
    clock.end_after(options.limit)
    found = compiler()
    if found is None:
        raise SystemExit("there is no C compiler")
    with tempfile.TemporaryDirectory() as directory:
        loop = compile_loop(found, Path(directory))
        ours, theirs = (arrays(options.elements, PLACES["staggered"]) for _ in range(2))
        seconds = []
        # The first turn touches fresh memory.
        for turn in range(options.steps + 1):
            param, grad, *states = ours
            cpu.update(SMORMS3, param, Mean(grad), states, (1, LEARNING_RATE, EPSILON))
            start = time.perf_counter()
            loop(options.elements, *theirs, LEARNING_RATE, EPSILON)
            if turn > 0:
                seconds.append(time.perf_counter() - start)
    for one, other in zip(ours, theirs, strict=True):
        if not np.array_equal(one, other):
            raise SystemExit("the kernel and the C loop give different results")
    version = subprocess.run(
        [found, "--version"], check=True, timeout=60, capture_output=True, text=True
    ).stdout.splitlines()[0]
    clock.write(
        options,
        elements=options.elements,
        seconds={"SMORMS3": seconds},
        versions={"C compiler": version, "flags": FLAGS},
    )


if __name__ == "__main__":
    main()
