"""Judges the machine: cores, room in memory and on disk, limits, its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from smorms3_dist.doctor.findings import Finding, green, red, yellow

_MIB = 1 << 20
_SHARED_OF_RANK = 16 * _MIB
"""What Open MPI maps for a rank. It must be free when the rank starts, or there is none for it."""

_TEMPORARY_NEEDED = 16 * _MIB
_TEMPORARY_WANTED = 256 * _MIB
_FILES_NEEDED = 256
_FILES_WANTED = 1024

_SOCKET_BYTES = 60
"""Sockets have paths of at most 107 bytes, and 40 of them and more are names within the folder."""


def cores(machine: int, affinity: int, usable: int) -> Finding:
    """Judges cores: those of the machine, of the affinity, and what the container leaves of it."""
    found = f"{usable} of {machine}"
    if usable < affinity:
        found += f" (the container's limit; the affinity is {affinity})"
    elif affinity < machine:
        found += " (affinity)"
    if usable == 1:
        return yellow(
            f"{found}: ranks on this host take turns", "give this process a core for each rank"
        )
    return green(found)


def threads(usable: int, environment: Mapping[str, str]) -> Finding:
    """Judges how many ranks have cores of their own, with the threads that NumPy uses."""
    text = environment.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return green(
            f"up to {_ranks(usable)} with a core each; OMP_NUM_THREADS is not set: smorms3-dist "
            "run sets it, mpirun by hand does not"
        )
    first = text.partition(",")[0].strip()
    if not first.isdigit() or int(first) == 0:
        return red(f"OMP_NUM_THREADS is {text!r}, which is no number", "unset OMP_NUM_THREADS")
    if int(first) > usable:
        return yellow(
            f"OMP_NUM_THREADS={text}, but there are only {usable} cores",
            "unset OMP_NUM_THREADS, or set it to the number of cores divided by that of ranks",
        )
    return green(f"up to {_ranks(usable // int(first))} with OMP_NUM_THREADS={text}")


def shared_memory(path: Path, free: int | None, ranks: int) -> Finding:
    """Judges the free bytes for memory that ranks and workers share; ``None``: it is not there.

    So many ranks have a GPU, or a core, of this host.
    """
    remedy = (
        "docker run --shm-size=1g; in Kubernetes, an emptyDir with medium: Memory mounted there; "
        "or delete what lies there"
    )
    if free is None:
        return yellow(f"there is no {path}", f"mount a tmpfs at {path}")
    enough_for = free // _SHARED_OF_RANK
    found = f"{free // _MIB} MiB are free in {path}"
    each = f"{_SHARED_OF_RANK // _MIB} MiB each"
    if enough_for == 0:
        return yellow(f"{found}: too little for any rank ({each}), which sends more slowly", remedy)
    found += f", enough for {_ranks(enough_for)} ({each})"
    if enough_for < ranks:
        return yellow(f"{found}, of the {ranks} that this host is for", remedy)
    left = (free - ranks * _SHARED_OF_RANK) // _MIB
    return green(f"{found}; with {_ranks(ranks)}, {left} MiB are left for workers of iterators")


def temporary_space(path: Path, free: int) -> Finding:
    """Judges the folder for temporary files, and the bytes that are free in it."""
    if len(str(path)) > _SOCKET_BYTES:
        return yellow(
            f"{path} is so long a path that sockets in it cannot have a name",
            "set TMPDIR to a folder with a shorter path",
        )
    remedy = "make room there, or set TMPDIR to another folder"
    return _space(path, free, _TEMPORARY_NEEDED, _TEMPORARY_WANTED, remedy)


def open_files(soft: int, hard: int) -> Finding:
    """Judges how many files a process may have open, connections among them; negative: any."""
    if soft < 0 or soft >= _FILES_WANTED:
        return green("no limit" if soft < 0 else f"{soft}")
    target = _FILES_WANTED if hard < 0 else min(hard, _FILES_WANTED)
    remedy = f"ulimit -n {target}" if target > soft else "have the hard limit raised (limits.conf)"
    found = f"{soft}: each rank has a connection to each other one, and more for its data"
    return red(found, remedy) if soft < _FILES_NEEDED else yellow(found, remedy)


def host_name(name: str, addresses: Sequence[str], trouble: str) -> Finding:
    """Judges the name of this host by the addresses that it leads to, or why there are none."""
    if not addresses:
        return yellow(
            f"{name} has no address ({trouble}): launchers may wait for it, and other hosts do not "
            "find it",
            f"add {name} to /etc/hosts, or to the DNS",
        )
    return green(f"{name} is {', '.join(addresses)}")


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def _space(path: Path, free: int, needed: int, wanted: int, remedy: str) -> Finding:
    found = f"{free // _MIB} MiB are free in {path}"
    if free < needed:
        return red(f"{found}: not enough for any job", remedy)
    if free < wanted:
        return yellow(f"{found}, which is little", remedy)
    return green(found)
