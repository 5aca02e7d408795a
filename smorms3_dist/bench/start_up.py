"""Program: how long things take to start, each in processes of its own.

What is imported beside what it needs itself; the first update of one process, with an empty cache
of compiled kernels and with one that the first has filled; and a program that does nothing, on two
ranks, started by mpirun and by ``smorms3-dist run``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from smorms3_dist.bench import clock
from smorms3_dist.bench.processes_of_cases import mpirun

IMPORTS = {
    "import numpy": "import numpy",
    "import smorms3_dist": "import smorms3_dist",
    "import smorms3_dist, chainer": "import smorms3_dist, chainer",
    "import smorms3_dist, chainermn": "import smorms3_dist, chainermn",
}

FIRST_UPDATE = """
import smorms3_dist, chainer, numpy, time
from mpi4py import MPI
link = chainer.Link()
with link.init_scope():
    link.p = chainer.Parameter(numpy.ones(1000, 'f'))
optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), MPI.COMM_WORLD)
optimizer.setup(link)
start = time.perf_counter()
for _ in range(2):
    link.p.grad = numpy.ones(1000, 'f')
    optimizer.update()
print(time.perf_counter() - start)
"""

NOTHING = "import smorms3_dist, chainermn; chainermn.create_communicator('naive')"


def _seconds(command: Sequence[str], **variables: str) -> float:
    start = time.perf_counter()
    _run(command, variables)
    return time.perf_counter() - start


def _run(command: Sequence[str], variables: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr}")
    return done.stdout


def main() -> None:
    """Measures by processes that this one starts."""
    options = clock.arguments().parse_args()
    clock.end_after(options.limit)
    seconds: dict[str, list[float]] = {}

    def note(phase: str, taken: float) -> None:
        seconds.setdefault(phase, []).append(taken)

    python = [sys.executable, "-c"]
    # So that files of compiled code are there, as after an installation, and in the page cache.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for code in IMPORTS.values():
        _seconds([*python, code])
    for _ in range(max(options.steps // 2, 1)):
        for phase, code in IMPORTS.items():
            note(phase, _seconds([*python, code]))
        with tempfile.TemporaryDirectory() as cache:
            for phase in (
                "first update, kernels not compiled",
                "first update, kernels in the cache",
            ):
                variables = {"NUMBA_CACHE_DIR": cache}
                note(phase, float(_run([*python, FIRST_UPDATE], variables).splitlines()[-1]))
        note("mpirun -n 2", _seconds([mpirun(), "-n", "2", *python, NOTHING]))
        with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
            script.write(NOTHING)
            script.flush()
            ours = [sys.executable, "-m", "smorms3_dist", "run", "-n", "2", script.name]
            note("smorms3-dist run -n 2", _seconds(ours))
    clock.write(options, seconds=seconds)


if __name__ == "__main__":
    main()
