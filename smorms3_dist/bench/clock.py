"""What all programs measure alike: a step, a memcpy of the gradients' size, and peak memory.

NumPy is all that this module needs, so that it runs in any system's interpreter.

Time: gradients are computed outside of what is timed. Every timed phase starts behind a barrier,
and its time is that of the slowest rank. A phase counts with a sign: a system that communicates
within its backward pass reports that pass, and, to be subtracted, the same pass without
communication. As many steps are timed as fit into a budget of seconds.

Memcpy: after each step all ranks, started by a barrier, copy one array of the gradients' size to
another at the same time, both touched before.

Peak memory over base: first a tiny model takes a step, which loads all the code that is needed. The
base is the resident size (VmRSS) of a rank's process that has then built the bare model and run one
forward and backward pass, its gradients still alive, without any optimizer. The kernel's high-water
mark (VmHWM) is then reset, the optimizer is set up and takes its first steps, and the high-water
mark less the base is the result. The arrays of the memcpy are made later.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smorms3_dist.bench.workloads import TINY, WORKLOADS, Workload

import numpy as np

WARM_UP_STEPS = 3
FEWEST_STEPS = 3

Timed = Callable[[str, Callable[[], object]], None]
"""``timed(phase, function)`` calls a function, and times it as a phase."""


class Ranks(NamedTuple):
    """What a measurement needs of a system's communication.

    Attributes:
        rank: This rank.
        barrier: Returns when all ranks have called it.
        gather: Returns the values of all ranks, by rank, on every rank.
    """

    rank: int
    barrier: Callable[[], object]
    gather: Callable[[Any], list[Any]]


class System(Protocol):
    """One rank of a system to measure."""

    @property
    def signs(self) -> Mapping[str, int]:
        """The phases of a step, and how the time of each one counts: 1 or -1."""

    def forward_backward(self) -> None:
        """Computes gradients with the bare model, before any optimizer exists."""

    def set_up(self) -> None:
        """Makes the optimizer, and does what its first step alone needs."""

    def step(self, timed: Timed) -> None:
        """Takes one step; what counts is timed."""

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""


def arguments() -> argparse.ArgumentParser:
    """What every program of a case is started with."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--ranks", type=int, required=True)
    add("--steps", type=int, required=True, help="timed steps at most")
    add("--budget", type=float, required=True, help="seconds that timed steps may take")
    add("--limit", type=int, required=True, help="seconds that this process may live")
    add("--result", type=Path, required=True, help="file for rank 0 to write")
    return parser


def end_after(seconds: int) -> None:
    """Lets the system end this process after so many seconds, whatever it waits for."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def write(options: argparse.Namespace, **result: Any) -> None:
    """Writes what was measured, and the versions that are given with it, to the file asked for."""
    versions = {"Python": platform.python_version(), "NumPy": np.__version__}
    result["versions"] = versions | result.get("versions", {})
    options.result.write_text(json.dumps(result))


class Clock:
    """Times phases that all ranks begin together.

    Args:
        ranks: The ranks.

    Attributes:
        seconds: What every call took on this rank, in order, by phase.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._ranks = ranks

    def __call__(self, phase: str, function: Callable[[], object]) -> None:
        """Times one call of a function; all ranks make it."""
        self._ranks.barrier()
        start = time.perf_counter()
        function()
        self.seconds.setdefault(phase, []).append(time.perf_counter() - start)
        self._ranks.barrier()

    def slowest(self) -> dict[str, list[float]]:
        """The time of the slowest rank, for every call of every phase. All ranks call it."""
        everybodys = self._ranks.gather(self.seconds)
        return {
            phase: [max(times) for times in zip(*(rank[phase] for rank in everybodys), strict=True)]
            for phase in everybodys[0]
        }

    def repeat(self, function: Callable[[], object], options: argparse.Namespace) -> None:
        """Calls a function as often as the budget allows, after forgetting what was timed.

        The same number of times on all ranks: the slowest one's first call decides.
        """
        self.seconds.clear()
        start = time.perf_counter()
        function()
        first = max(self._ranks.gather(time.perf_counter() - start))
        steps = int(options.budget / max(first, 1e-9))
        for _ in range(min(max(steps, FEWEST_STEPS), options.steps) - 1):
            function()


def measure(
    make: Callable[[Workload], System],
    ranks: Ranks,
    options: argparse.Namespace,
    versions: Mapping[str, str],
    extra: Callable[[System, Timed], object] | None = None,
) -> None:
    """Measures optimizer and communication of a system, and writes the result. All ranks call it.

    Args:
        make: Makes the system, for a workload.
        ranks: The ranks.
        options: The command line: `arguments`, and the name of a ``workload``.
        versions: What to say of the software.
        extra: What else is to be timed after every step.
    """
    clock = Clock(ranks)
    tiny = make(TINY)
    tiny.forward_backward()
    tiny.set_up()
    tiny.step(clock)
    del tiny

    workload = WORKLOADS[options.workload]
    system = make(workload)
    system.forward_backward()
    base = memory("VmRSS")
    was_reset = reset_peak()
    system.set_up()
    for _ in range(WARM_UP_STEPS):
        system.step(clock)
    peak = memory("VmHWM") - base

    source = np.ones(workload.size, np.float32)
    target = np.zeros(workload.size, np.float32)
    np.copyto(target, source)

    def turn() -> None:
        system.step(clock)
        if extra is not None:
            extra(system, clock)
        clock("memcpy", lambda: np.copyto(target, source))

    clock.repeat(turn, options)
    seconds = clock.slowest()
    phases = [(sign, seconds.pop(phase)) for phase, sign in system.signs.items()]
    # What a phase without communication takes from step to step differs by more than a small step.
    seconds["step"] = [
        max(sum(sign * times[i] for sign, times in phases), 0.0) for i in range(len(phases[0][1]))
    ]
    result: dict[str, Any] = {"state_bytes": ranks.gather(system.state_bytes())}
    peaks = ranks.gather(peak)
    if all(ranks.gather(was_reset)):
        # Otherwise a peak has in it what a process needed before.
        result["peak_over_base_bytes"] = peaks
    if ranks.rank == 0:
        write(options, parameters=workload.size, seconds=seconds, versions=versions, **result)


def memory(field: str) -> int:
    """Bytes of a field of this process's status: ``VmRSS`` is resident now, ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: measuring memory needs Linux")


def reset_peak() -> bool:
    """Sets ``VmHWM`` back to what is resident now; returns whether the system allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except PermissionError:
        return False
    return True
