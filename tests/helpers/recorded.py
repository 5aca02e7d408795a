"""Results of the benchmark as it stores them, with numbers that are made up by formulas."""

from __future__ import annotations

from typing import Any

from smorms3_dist.bench.rule_kernels import PLACES, RULES
from smorms3_dist.bench.suite import Case
from smorms3_dist.bench.workloads import WORKLOADS

SLOWER = {"chainermn": 10.0, "ddp_zero": 4.0, "ddp_zero_amsgrad": 5.0, "chainer": 3.0, "torch": 0.8}

MEMCPY, UPDATE, SENT, OVER_TCP = 1e-10, 1e-9, 0.5e-9, 0.7e-9
"""Seconds that one rank takes to copy a byte and to update an element, and that it takes two ranks
to send each other a byte, in shared memory and over TCP."""

OVERHEAD, WORD = 200e-6, 20e-6


def result(cases: list[Case], cores: int = 2, started: str = "2030-01-01") -> dict[str, Any]:
    """A result of these cases."""
    return {
        "machine": {
            "cpu": "a processor",
            "cores": cores,
            "memory_bytes": 8 << 30,
            "system": "Linux x86_64",
            "started": started,
            "load_average_at_start": 0.1,
            "load_average_at_end": 1.9,
        },
        "quick": False,
        "rounds": 1,
        "versions": {"smorms3_dist": {"Python": "3.11.7"}, "chainermn": {"Python": "3.11.7"}},
        "failed": [],
        "runs": [
            {
                "part": case.part,
                "name": case.name,
                "system": case.system,
                "ranks": case.ranks,
                "round": 0,
                "cores_used_by_others": 0.05,
                **_measured(case, max(1.0, case.ranks / cores)),
            }
            for case in cases
        ],
    }


def _spread(seconds: float) -> list[float]:
    return [seconds * factor for factor in (0.98, 1.0, 1.0, 1.0, 1.1)]


def _measured(case: Case, shared: float) -> dict[str, Any]:
    """What a program of such a case may tell; cores are shared by so many ranks."""
    slower = SLOWER.get(case.system, 1.0)
    words = case.arguments
    if case.part == "kernel":
        elements = int(words[words.index("--elements") + 1])
        if case.system == "c":
            return {"elements": elements, "seconds": {"SMORMS3": _spread(elements * UPDATE)}}
        seconds = {
            f"{rule}, {place}": _spread(elements * UPDATE * (1 + (place == "equal")))
            for rule in RULES
            for place in PLACES
        }
        return {
            "elements": elements,
            "bytes_an_element": {rule: 36 if rule == "SMORMS3" else 20 for rule in RULES},
            "seconds": seconds,
        }
    if case.part == "whole":
        seconds = {"forward": 0.1, "backward": 0.2, "update": 0.01 * slower}
        if case.system == "smorms3_dist":
            seconds |= {"reduce and update": 0.006, "gather": 0.003}
        seconds["step"] = 0.3 + seconds["update"]
        return {"parameters": 2_000_000, "page_faults": 7, "seconds": _lists(seconds)}
    if case.part == "exchange":
        nbytes = 64 << 20
        sent = nbytes / 2 * (OVER_TCP if "--over-tcp" in words else SENT)
        seconds = {"word": WORD, "exchange": sent, "gather": sent, "memcpy": nbytes * MEMCPY}
        return {"bytes": nbytes, "seconds": _lists(seconds)}
    if case.part == "checkpoint":
        phases = ("save", "stall", "first_stall", "background", "load", "reshard", "load_dropped")
        plain = ("reshard_dropped", "write", "read", "read_dropped", "memcpy")
        seconds = dict.fromkeys((*phases, *plain), 0.2 * slower)
        seconds |= {"step": 0.03, "step_saving": 0.04}
        return {
            "parameters": 1000,
            "own_bytes": [8000, 8000],
            "peaks_over_base_bytes": {"load": [1 << 20] * 2, "save": [0] * 2},
            "seconds": _lists(seconds),
        }
    if case.part == "start":
        return {"seconds": _lists({"import numpy": 0.1, "mpirun -n 2": 0.9})}
    workload = next(WORKLOADS[word] for word in words if word in WORKLOADS)
    nbytes, n = 4 * workload.size, case.ranks
    sent = 2 * (n - 1) / n * nbytes * SENT
    # A memcpy moves its bytes twice.
    summed = nbytes / n * (n - 1 + 2 * max(n - 2, 0)) * MEMCPY / 2
    work = workload.size / n * UPDATE + sent + summed
    step = OVERHEAD + WORD * (n - 1).bit_length() + shared * work
    seconds = {"step": slower * step, "memcpy": shared * nbytes * MEMCPY}
    if "--check-sync" in words:
        seconds["check_sync"] = step / 5
    if "--as-one" in words:
        seconds["as one"] = step / 2
    if "--shared" in words:
        seconds["shared"] = step / 1.25
    return {
        "parameters": workload.size,
        "state_bytes": [100] * n,
        "peak_over_base_bytes": [200 << 20] * n,
        "seconds": _lists(seconds),
    }


def _lists(seconds: dict[str, float]) -> dict[str, list[float]]:
    return {phase: _spread(each) for phase, each in seconds.items()}
