"""Peak memory of a GPU in training steps: this project beside ChainerMN's pure_nccl.

`benchmarks/peers/gpu_memory.py` says how it is measured; `gpu_update.py` stores the results.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.bench.processes_of_cases import mpirun, run_processes
from smorms3_dist.layout import gpu_bucket_bytes

ROOT = Path(__file__).resolve().parent.parent

PARAMETERS = 60_000_000
STEPS = 3
TITLES = {"smorms3_dist": "smorms3_dist", "pure_nccl": "ChainerMN pure_nccl, Chainer's SMORMS3"}
MIB = 2**20


def expected(parameters: int, ranks: int) -> float:
    """Bytes that training float32 parameters with this project should take of each GPU.

    Parameters and gradients, this rank's part of three states, and two buckets on several ranks.
    """
    buckets = 2 * gpu_bucket_bytes(ranks) if ranks > 1 else 0
    return (8 + 12 / ranks) * parameters + buckets


def compare(gpus: int) -> list[dict[str, Any]]:
    """Measures both systems on one GPU, and on all if there are more; each in its own processes."""
    rows = []
    for ranks in sorted({1, gpus}):
        for system in TITLES:
            command = [mpirun(), "-n", str(ranks), sys.executable, "-m"]
            command += ["benchmarks.peers.gpu_memory", "--system", system]
            command += ["--parameters", str(PARAMETERS), "--steps", str(STEPS)]
            run = run_processes(command, ROOT, f"{system} on {ranks} GPUs")
            rows.append({"system": system} | run)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table of the results: the largest of the ranks, over 8 bytes a parameter."""
    lines = [
        "| system | GPUs | in use in steps | expected | in use before the first step "
        "| taken by the pool | gone from the device |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ranks = row["ranks"]
        parameters = ranks[0]["parameters"]
        numbers = {
            (phase, kind): max(rank[phase][kind] for rank in ranks)
            for phase in ("set_up", "steps")
            for kind in ranks[0][phase]
        }
        bound = expected(parameters, len(ranks)) if row["system"] == "smorms3_dist" else None
        cells = (
            numbers["steps", "in_use"],
            bound,
            numbers["set_up", "in_use"],
            numbers["steps", "pool"],
            numbers["steps", "device"],
        )
        texts = [
            "" if cell is None else f"{(cell - 8 * parameters) / MIB:.0f}, {cell / parameters:.1f}"
            for cell in cells
        ]
        lines.append(f"| {TITLES[row['system']]} | {len(ranks)} | {' | '.join(texts)} |")
    parameters = rows[0]["ranks"][0]["parameters"]
    return [
        f"Peak memory of a GPU, {parameters / 1e6:.1f}M parameters: MiB over parameters and "
        f"gradients ({8 * parameters / MIB:.0f} MiB), and bytes a parameter in all:",
        "",
        *lines,
    ]
