"""Systems that take turns in the same processes, so that what disturbs one disturbs all of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from mpi4py import MPI


def take_turns(turns: Mapping[str, Callable[[], float]], steps: int) -> dict[str, list[float]]:
    """Lets each system take so many turns after a first one; returns their seconds, by name.

    Args:
        turns: Makes a turn and returns its seconds, by the name of the system.
        steps: How many turns of each count.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    for step in range(steps + 1):
        for name, turn in turns.items():
            took = turn()
            # Once to fault in memory and compile what is compiled.
            if step:
                times[name].append(took)
    return times


def where(comm: Any) -> str:
    """The ranks, their hosts and this host's load, in words. Collective."""
    hosts = len(set(comm.mpi_comm.allgather(MPI.Get_processor_name())))
    return f"{comm.size} ranks, {hosts} hosts, load {os.getloadavg()[0]:.1f}"


def print_table(times: Mapping[str, list[float]]) -> None:
    """Prints the median of each system, its spread, and its ratio to the first one's."""
    first = statistics.median(next(iter(times.values())))
    for name, each in times.items():
        median = statistics.median(each)
        spread = f"{min(each) * 1e3:.0f} to {max(each) * 1e3:.0f}"
        print(f"{name:24}{median * 1e3:7.0f} ms  ({spread})  {median / first:5.2f}")
