"""What all systems measure alike of checkpoints: saving, loading and memory, beside plain copies.

NumPy is all that this module needs, so that it runs in any peer's interpreter.

A model is a list of parameters with three states each, of which every rank owns a part. Nothing
computes: its arrays are what there is to save. Every timed phase starts behind a barrier, and its
time is that of the slowest rank. Phases take turns with what they are compared with:

``save``, ``write``
    Saving until the checkpoint is there for good; and every rank writing as many bytes as it owns
    into one new file and bringing them to the disk by fsync.
``stall``, ``memcpy``, ``memcpy_in_4``, ``background``
    What the training waits when a save goes on in the background; a memcpy of as many bytes as a
    rank owns, by all ranks at once, from and to memory that was touched before, of one array and of
    four (how fast the C library copies depends on the size); and what is left to wait if the
    training then does nothing but wait. The first stall is stored apart.
``load``, ``reshard``, ``read``
    Loading what as many ranks have saved; what another number of ranks has saved; and every rank
    reading the file of ``write`` into memory that was touched before. Once with all of it in the
    page cache, and once, as ``load_dropped`` and so on, after the cache was told to drop it.
``step``, ``step_saving``
    Steps of training, of which only the optimizer's part is made; and the same steps while a save
    goes on in the background. For systems that have steps here.

Before anything is timed, every rank touches and frees memory: a virtual machine may give memory
that is free for seconds back to its host, and to get it again takes longer than what is timed.

Peaks: first a tiny model is saved and loaded, which loads all code that is needed. The base is the
resident size of a process that has then built its model and states. The high-water mark is reset
before the first load, before the first save and before the first one in the background, and what
it then reaches above the base is stored.

Every load is checked: the arrays are set to zero before it, and their sums are compared after it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from smorms3_dist.bench import clock
from smorms3_dist.bench.workloads import WORKLOADS

import numpy as np

Shapes = list[tuple[int, ...]]

STATES = 3

BYTES = 4 * (1 + STATES)
"""Bytes of an element of a parameter, with its states."""

MADE = "made"
"""Name of the directory with the checkpoint that another number of ranks has made."""


def _mixed(count: int, smallest: float, largest: float) -> Shapes:
    """Vectors whose sizes are spread evenly on a logarithmic scale."""
    exponents = np.linspace(math.log(smallest), math.log(largest), count)
    return [(round(math.exp(exponent)),) for exponent in exponents]


_SMALL = _mixed(5000, 10, 1000)

MODELS: Mapping[str, Shapes] = {
    "59M": WORKLOADS["59M"].shapes,
    "mixed": _mixed(200, 10, 1e6),
    "5000 small": _SMALL,
    "5000 small as one": [(sum(map(math.prod, _SMALL)),)],
    "tiny": [(64, 64), (64,)],
}
"""Shapes of the parameters by names of models: an MLP, 200 parameters from 10 to a million elements
(17 million in all), 5000 from 10 to 1000 (1.1 million in all), and one array of as many elements as
these."""


class Peer(Protocol):
    """One rank of a system to measure."""

    step: Callable[[], object] | None
    """Makes a step of training, if that is measured."""

    def arrays(self) -> list[np.ndarray]:
        """What this rank owns, to look at and to write to."""

    def save(self, number: int) -> None:
        """Saves; returns when the checkpoint is there for good."""

    def begin_save(self, number: int) -> None:
        """Saves in the background; returns when the training may change what is saved."""

    def is_saving(self) -> bool:
        """Whether it has still to go on, on this rank."""

    def end_save(self) -> None:
        """Waits until the checkpoint is there for good."""

    def place(self, number: int) -> Path:
        """The directory of a checkpoint that it has saved."""

    def load_own(self, number: int) -> None:
        """Loads a checkpoint that it has saved."""

    def load(self, directory: Path) -> None:
        """Loads the checkpoint number 0 of a peer that was made for another directory."""


def arguments() -> argparse.ArgumentParser:
    """The command line that every peer is started with."""
    parser = clock.arguments()
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="where files go")
    parser.add_argument(
        "--make", action="store_true", help="only save, for other processes to load"
    )
    return parser


def run(
    make: Callable[[Shapes, Path], Peer],
    ranks: clock.Ranks,
    options: argparse.Namespace,
    versions: Mapping[str, str],
) -> None:
    """Measures a peer, or makes a checkpoint, and writes the results as JSON. All ranks call it.

    Args:
        make: Makes the peer, for a model and a directory of its own.
        ranks: The ranks.
        options: The command line; see `arguments`.
        versions: What to say of the software.
    """
    if options.make:
        make(MODELS[options.model], options.directory / MADE).save(0)
        result: dict[str, Any] = {}
    else:
        tiny = make(MODELS["tiny"], options.directory / "tiny")
        tiny.save(0)
        tiny.load_own(0)
        tiny.begin_save(1)
        tiny.end_save()
        del tiny
        peer = make(MODELS[options.model], options.directory / "own")
        result = _Measurement(peer, ranks, options).result()
    if ranks.rank == 0:
        clock.write(options, **result, versions=versions)
    ranks.barrier()


class _Measurement:
    def __init__(self, peer: Peer, ranks: clock.Ranks, options: argparse.Namespace) -> None:
        self._peer = peer
        self._ranks = ranks
        self._options = options
        self._time = clock.Clock(ranks)
        self._repeats = max(options.steps // 3, 1)
        self._own = sum(array.nbytes for array in peer.arrays())
        self._expected = self._sum()
        self._peaks: dict[str, int] = {}
        self._in_peak = False
        self._numbers = itertools.count()
        self._steps: dict[str, float] = {}
        self._dropped: list[float] = []
        self._base = clock.memory("VmRSS")

    def result(self) -> dict[str, Any]:
        made = self._options.directory / MADE
        with self._peak("load"):
            self._checked(lambda: self._peer.load(made))
        with self._peak("save"):
            last = self._save()
        with self._peak("save_in_background"):
            self._save_in_background()
        first_stall = self._time.slowest()["stall"][0]
        self._time.seconds.clear()

        own = np.ones(self._own, np.uint8)
        buffer = np.full(self._own, 2, np.uint8)
        quarters = [np.array_split(array, 4) for array in (buffer, own)]
        plain = self._options.directory / f"plain-{self._ranks.rank}"
        for _ in range(self._repeats):
            self._remove(last)
            last = self._save()
            plain.unlink(missing_ok=True)
            self._clock("write", lambda: _write(plain, own))
        for _ in range(self._repeats):
            self._save_in_background()
            self._clock("memcpy", lambda: np.copyto(buffer, own))
            self._clock("memcpy_in_4", lambda: list(map(np.copyto, *quarters)))
        loads: dict[str, tuple[list[Path], Callable[[], object]]] = {
            "load": ([self._peer.place(last)], lambda: self._peer.load_own(last)),
            "reshard": ([made], lambda: self._peer.load(made)),
            "read": (
                [plain.with_name(f"plain-{rank}") for rank in self._everyone()],
                lambda: _read(plain, buffer),
            ),
        }
        for _ in range(self._repeats):
            for phase, (paths, load) in loads.items():
                self._load(phase, paths, load)
        if self._peer.step is not None:
            self._time_steps(self._peer.step)
        self._remove(last)
        return self._gathered(first_stall)

    def _gathered(self, first_stall: float) -> dict[str, Any]:
        gather = self._ranks.gather
        seconds = self._time.slowest() | {"first_stall": [first_stall]}
        steps = gather(self._steps)
        seconds |= {kind: [max(rank[kind] for rank in steps)] for kind in steps[0]}
        return {
            "parameters": sum(map(math.prod, MODELS[self._options.model])),
            "own_bytes": gather(self._own),
            "seconds": seconds,
            "peaks_over_base_bytes": {kind: gather(peak) for kind, peak in self._peaks.items()},
            "read_from_disk": min(gather(min(self._dropped))),
        }

    def _clock(self, phase: str, function: Callable[[], object]) -> None:
        if not self._in_peak:
            self._touch()
        self._time(phase, function)

    def _touch(self) -> None:
        np.empty(2 * self._own, np.uint8).fill(1)

    def _everyone(self) -> range:
        return range(len(self._ranks.gather(None)))

    def _sum(self) -> float:
        mine = math.fsum(float(np.sum(array, dtype=np.float64)) for array in self._peer.arrays())
        return math.fsum(self._ranks.gather(mine))

    def _checked(self, load: Callable[[], object]) -> None:
        for array in self._peer.arrays():
            array[...] = 0
        load()
        found = self._sum()
        if not math.isclose(found, self._expected, rel_tol=1e-6):
            raise RuntimeError(f"loaded arrays sum to {found}, and {self._expected} were saved")

    @contextlib.contextmanager
    def _peak(self, kind: str) -> Iterator[None]:
        self._touch()
        was_reset = clock.reset_peak()
        self._in_peak = True
        yield
        self._in_peak = False
        if was_reset:
            self._peaks[kind] = clock.memory("VmHWM") - self._base

    def _save(self) -> int:
        number = next(self._numbers)
        self._clock("save", lambda: self._peer.save(number))
        return number

    def _save_in_background(self) -> None:
        number = next(self._numbers)
        self._clock("stall", lambda: self._peer.begin_save(number))
        self._clock("background", self._peer.end_save)
        self._remove(number)

    def _remove(self, number: int) -> None:
        self._ranks.barrier()
        if self._ranks.rank == 0:
            shutil.rmtree(self._peer.place(number))
        self._ranks.barrier()

    def _load(self, phase: str, paths: list[Path], load: Callable[[], object]) -> None:
        def timed(name: str) -> None:
            if phase == "read":
                self._clock(name, load)
            else:
                self._checked(lambda: self._clock(name, load))

        files = [file for path in paths for file in _files(path)]
        for file in files:
            _read(file)
        timed(phase)
        self._ranks.barrier()
        for file in files:
            _drop(file)
        self._ranks.barrier()
        before = _read_from_disk()
        timed(f"{phase}_dropped")
        read = sum(self._ranks.gather(_read_from_disk() - before))
        self._dropped.append(read / sum(file.stat().st_size for file in files))

    def _time_steps(self, step: Callable[[], object]) -> None:
        """Times steps with and without a save, as many of each.

        A step is made by all ranks together. So all of them go on until none is saving any more.
        """
        times: dict[str, list[float]] = {"step": [], "step_saving": []}

        def timed(kind: str) -> None:
            start = time.perf_counter()
            step()
            times[kind].append(time.perf_counter() - start)

        timed("step")
        number = next(self._numbers)
        self._peer.begin_save(number)
        while any(self._ranks.gather(self._peer.is_saving())):
            timed("step_saving")
        self._peer.end_save()
        self._remove(number)
        for _ in times["step_saving"]:
            timed("step")
        self._steps = {
            kind: sorted(found)[len(found) // 2] for kind, found in times.items() if found
        }


def _files(path: Path) -> Iterator[Path]:
    """All files in a directory and below, or the file itself."""
    return (file for file in [path, *path.rglob("*")] if file.is_file())


def _write(path: Path, data: np.ndarray) -> None:
    with open(path, "xb", buffering=0) as file:
        rest = data.data
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def _read(path: Path, out: np.ndarray | None = None) -> None:
    rest = memoryview(bytearray(1 << 20)) if out is None else out.data
    with open(path, "rb", buffering=0) as file:
        while rest and (count := file.readinto(rest)):
            rest = rest if out is None else rest[count:]


def _drop(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_from_disk() -> int:
    """Bytes that this process has made the system read from a disk."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes; this benchmark needs Linux")
