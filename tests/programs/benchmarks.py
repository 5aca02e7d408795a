"""Runs programs of the benchmark on MPI ranks, one after the other, with little to do."""

from __future__ import annotations

import sys
from pathlib import Path

from smorms3_dist.bench import rank_exchanges, update_step, whole_step

from mpi4py import MPI
from mpirun import report

COMMON = ["--ranks", str(MPI.COMM_WORLD.size), "--steps", "4", "--budget", "0", "--limit", "900"]
CHECKED = ["--workload", "one element", "--option", "check_finite=error", "--check-sync"]
RECORDED = ["--workload", "one element", "--recorded"]
SHARED = ["--workload", "one element", "--shared"]
HOOKED = ["--workload", "200 small", "--rule", "Adam", "--hooks", "WeightDecay", "GradientClipping"]

folder = Path(sys.argv[1])
rank_exchanges.NBYTES = 1 << 20
for model in whole_step.MODELS.values():
    model.inputs = model.inputs[:2]

for name, program, words in (
    ("checked", update_step, ["--system", "smorms3_dist", *CHECKED]),
    ("recorded", update_step, ["--system", "smorms3_dist", *RECORDED]),
    ("hooked", update_step, ["--system", "smorms3_dist", *HOOKED, "--as-one"]),
    ("shared", update_step, ["--system", "smorms3_dist", *SHARED]),
    ("hooked, chainermn", update_step, ["--system", "chainermn", *HOOKED]),
    ("exchange", rank_exchanges, []),
    ("whole, chainermn", whole_step, ["--system", "chainermn", "--model", "ConvNet"]),
    # Last: it times methods of the class.
    ("whole", whole_step, ["--system", "smorms3_dist", "--model", "LSTM"]),
):
    sys.argv[1:] = [*COMMON, "--result", str(folder / f"{name}.json"), *words]
    program.main()
report(MPI.COMM_WORLD.rank)
