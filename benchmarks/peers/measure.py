"""What all peers measure alike: the step, a memcpy of the gradients' size, and peak memory.

NumPy is all that this module needs, so that it runs in any peer's interpreter.

Time: a peer computes its gradients outside of what is timed. Every timed phase starts behind a
barrier, and its time is that of the slowest rank. A phase counts with a sign: a peer that
communicates within its backward pass reports that pass, and, to be subtracted, the same pass
without communication.

Memcpy: after each step all ranks, started by a barrier, copy one array of the gradients' size to
another at the same time, both touched before. The slowest rank counts. What is stored is the median
over the steps.

Peak memory over base: first a tiny model takes a step, which loads all the code that is needed. The
base is the resident size (VmRSS) of a rank's process that has then built the bare model and run one
forward and backward pass, its gradients still alive, without any optimizer. The kernel's high-water
mark (VmHWM) is then reset, the optimizer is set up and takes its first steps, and the high-water
mark less the base is the result. The arrays of the memcpy are made later.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

WIDTHS = {
    "19": (512, 2048, 2048, 2048, 2048, 2048, 512),
    "59": (384, 3072, 3072, 3072, 3072, 3072, 3072, 3072, 384),
}
"""Widths of the layers of the MLPs, input first, by the models' sizes in millions of parameters.

Every parameter has a multiple of 64 elements.
"""

BATCH = 2
"""Samples a rank: few, so that a training step is mostly optimizer and communication."""

TINY = (64, 64)

WARM_UP_STEPS = 3


class Ranks(NamedTuple):
    """What the measurement needs of a peer's communication.

    Attributes:
        rank: This rank.
        barrier: Returns when all ranks have called it.
        gather: Returns the values of all ranks, by rank, on every rank.
    """

    rank: int
    barrier: Callable[[], None]
    gather: Callable[[Any], list[Any]]


class Peer(Protocol):
    """One rank of a system to measure."""

    signs: Mapping[str, int]
    """The phases of a step, and how the time of each one counts: 1 or -1."""

    def forward_backward(self) -> None:
        """Computes gradients with the bare model, before any optimizer exists."""

    def set_up(self) -> None:
        """Makes the optimizer, and does what its first step alone needs."""

    def step(self, timed: Callable[[str, Callable[[], object]], None]) -> None:
        """Takes one step; ``timed(phase, function)`` times what counts."""

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""


def arguments() -> argparse.ArgumentParser:
    """The command line that `cpu_step.py` starts every peer with."""
    parser = common_arguments()
    parser.add_argument("--size", choices=WIDTHS, required=True)
    return parser


def common_arguments() -> argparse.ArgumentParser:
    """What every peer of every benchmark is started with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--limit", type=int, required=True, help="seconds this process may live")
    parser.add_argument("--result", type=Path, required=True, help="file for rank 0 to write")
    return parser


def end_after(seconds: int) -> None:
    """Lets the system end this process after so many seconds, whatever it waits for."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def measure(
    make: Callable[[tuple[int, ...]], Peer],
    ranks: Ranks,
    options: argparse.Namespace,
    versions: Mapping[str, str],
) -> None:
    """Measures a peer and writes the results as JSON. All ranks call it.

    Args:
        make: Makes the peer, for an MLP of these widths.
        ranks: The ranks.
        options: The command line; see `arguments`.
        versions: What to say of the software.
    """
    clock = Clock(ranks)
    tiny = make(TINY)
    tiny.forward_backward()
    tiny.set_up()
    tiny.step(clock)
    del tiny

    peer = make(WIDTHS[options.size])
    parameters = parameter_count(WIDTHS[options.size])
    peer.forward_backward()
    base = memory("VmRSS")
    was_reset = reset_peak()
    peer.set_up()
    for _ in range(WARM_UP_STEPS):
        peer.step(clock)
    peak = memory("VmHWM") - base

    source = np.ones(parameters, np.float32)
    target = np.zeros(parameters, np.float32)
    np.copyto(target, source)
    clock.seconds.clear()
    for _ in range(options.steps):
        peer.step(clock)
        clock("memcpy", lambda: np.copyto(target, source))

    phases = slowest(ranks.gather(clock.seconds))
    steps = [
        sum(sign * phases[phase][i] for phase, sign in peer.signs.items())
        for i in range(options.steps)
    ]
    result = {
        "parameters": parameters,
        "step_s": statistics.median(steps),
        "memcpy_s": statistics.median(phases["memcpy"]),
        "phases_s": {phase: statistics.median(phases[phase]) for phase in peer.signs},
        "state_bytes": ranks.gather(peer.state_bytes()),
        "peak_over_base_bytes": ranks.gather(peak),
        "peak_was_reset": all(ranks.gather(was_reset)),
        "versions": versions,
    }
    if ranks.rank == 0:
        options.result.write_text(json.dumps(result))


class Clock:
    """Times phases that all ranks begin together.

    Args:
        ranks: The ranks.

    Attributes:
        seconds: What every call took, in order, by phase.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._ranks = ranks

    def __call__(self, phase: str, function: Callable[[], object]) -> None:
        self._ranks.barrier()
        start = time.perf_counter()
        function()
        self.seconds.setdefault(phase, []).append(time.perf_counter() - start)
        self._ranks.barrier()


def slowest(seconds: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """The time of the slowest rank, for every call of every phase."""
    return {
        phase: [max(times) for times in zip(*(rank[phase] for rank in seconds), strict=True)]
        for phase in seconds[0]
    }


def parameter_count(widths: tuple[int, ...]) -> int:
    """Parameters of an MLP with biases."""
    return sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(widths))


def memory(field: str) -> int:
    """Bytes of a field of this process's status: ``VmRSS`` is resident now, ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def reset_peak() -> bool:
    """Sets ``VmHWM`` back to what is resident now; returns whether the system allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except PermissionError:
        return False
    return True
