"""What a measurement was made on, and what else that machine was doing: no host names, no paths."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """The hardware, and the load before the measurement."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


class Load:
    """Tells how many cores other processes used, on average, during a ``with`` block.

    Counted as this process's are those of its children that have been waited for, and their
    children.

    Attributes:
        others: Cores, once the block has ended.
    """

    others: float

    def __enter__(self) -> Load:
        self._start = (time.monotonic(), _busy_seconds(), _childrens_seconds())
        return self

    def __exit__(self, *error: object) -> None:
        end = (time.monotonic(), _busy_seconds(), _childrens_seconds())
        wall, busy, own = (after - before for before, after in zip(self._start, end, strict=True))
        self.others = round(max(busy - own, 0.0) / wall, 2)


def _busy_seconds() -> float:
    user, nice, system, _idle, _iowait, *rest = map(
        int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    )
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _childrens_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
