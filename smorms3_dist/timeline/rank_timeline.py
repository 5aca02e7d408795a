"""What a rank writes into its file: the phases of its steps, its checkpoints and its stalls.

A thread writes, once a second and at the end, so that a step is never written for.
"""

from __future__ import annotations

import atexit
import collections
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from smorms3_dist.phases import BESIDE, TRAINING, Phase, Phases, Span
from smorms3_dist.timeline.trace_file import LARGEST, TraceFile
from smorms3_dist.version import __version__

TIMELINE = "SMORMS3_TIMELINE"
"""The variable with the directory of the files."""

_RESTART_COUNT = "SMORMS3_RESTART_COUNT"

_WRITE_S = 1.0
"""How often it is written."""

_MOST_SPANS = 1 << 17
"""How many spans wait to be written, at most; the oldest are given up."""

_TRACKS = {TRAINING: "training", BESIDE: "checkpoint"}
_PHASES = frozenset(phase.key for phase in Phase)


class RankTimeline:
    """Writes what a rank does into ``rank-N.json`` of a directory, until it is closed.

    Args:
        directory: The directory, which is made if it is not there.
        rank: The rank.
        phases: Its phases, of which recording begins.
        attempt: How often the job has been started again; events of earlier attempts are kept.
        largest: As for `TraceFile`.

    Raises:
        OSError: If the file cannot be written.
    """

    def __init__(
        self, directory: Path, rank: int, phases: Phases, attempt: int = 0, largest: int = LARGEST
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"rank-{rank}.json"
        self._rank, self._attempt = rank, attempt
        self._unix = time.time() - time.perf_counter()
        self._clock: dict[str, float] | None = None
        self._file: TraceFile | None = TraceFile(self.path, attempt > 0, largest)
        self._spans: collections.deque[Span] = collections.deque(maxlen=_MOST_SPANS)
        self._began_us = self.now() * 1e6
        # One writer at a time: the thread, or whoever ends the process.
        self._lock = threading.Lock()
        self._write(self._head())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="smorms3_dist timeline", daemon=True)
        self._thread.start()
        phases.spans = self._spans
        phases.timeline = self
        phases.start()

    def now(self) -> float:
        """Seconds since 1970 by the clock of the events."""
        return self._unix + time.perf_counter()

    def note_clock(self, offset_s: float, uncertainty_s: float) -> None:
        """Notes by how many seconds this clock is ahead of rank 0's, and what that may be off."""
        self._clock = {"offset_s": offset_s, "uncertainty_s": uncertainty_s}
        with self._lock:
            self._write([self._clock_event()])

    def flush(self) -> None:
        """Writes what there is."""
        with self._lock:
            events = []
            while self._spans:
                events.append(self._event_of(self._spans.popleft()))
            self._write(events)

    def close(self) -> None:
        """Writes what there is, and nothing after that."""
        self._over.set()
        self._thread.join()
        self.flush()
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _run(self) -> None:
        while not self._over.wait(_WRITE_S):
            self.flush()

    def _write(self, events: list[str]) -> None:
        if self._file is None:
            return
        try:
            if self._file.is_full:
                self._file.begin_another()
                self._file.write(self._head())
            self._file.write(events)
        except OSError as error:
            # A full disk is no reason to end a training.
            self._file.close()
            self._file = None
            sys.stderr.write(
                f"smorms3_dist: rank {self._rank} writes no timeline any more: {self.path}: "
                f"{error.strerror}\n"
            )

    def _head(self) -> list[str]:
        host = socket.gethostname()
        named = [("process_name", TRAINING, {"name": f"rank {self._rank} on {host}"})]
        named += [("thread_name", track, {"name": name}) for track, name in _TRACKS.items()]
        events = [self._meta(name, track, args) for name, track, args in named]
        events.append(self._meta("process_sort_index", TRAINING, {"sort_index": self._rank}))
        told = {"attempt": self._attempt, "host": host, "process": os.getpid()}
        told["version"] = __version__
        events.append(self._meta("rank_start", TRAINING, told))
        return events if self._clock is None else [*events, self._clock_event()]

    def _meta(self, name: str, track: int, args: dict[str, Any]) -> str:
        """An event that says something about others."""
        event = {"name": name, "ph": "M", "pid": self._rank, "tid": track, "ts": self._began_us}
        return json.dumps({**event, "args": args})

    def _clock_event(self) -> str:
        return self._meta("clock", TRAINING, {"attempt": self._attempt, **(self._clock or {})})

    def _event_of(self, span: Span) -> str:
        begin = (self._unix + span.begin) * 1e6
        where = f'"pid": {self._rank}, "tid": {span.track}, "ts": {begin:.2f}'
        if span.end is None:
            args = json.dumps({"detail": span.detail})
            kind = f'"name": "{span.name}", "cat": "event", "ph": "i", "s": "p"'
            return f'{{{kind}, {where}, "args": {args}}}'
        category = "phase" if span.name in _PHASES else "step"
        if span.track == BESIDE:
            category = "checkpoint"
        kind = f'"name": "{span.name}", "cat": "{category}", "ph": "X"'
        # Of the end as it is rounded: viewers give up spans that end after those around them.
        return f'{{{kind}, {where}, "dur": {(self._unix + span.end) * 1e6 - begin:.2f}}}'


def start_timeline(phases: Phases, rank: int) -> None:
    """Begins the recording that the environment asks for, if it does, for this process's rank.

    Raises:
        ValueError: If the directory cannot be written to.
    """
    directory = os.environ.get(TIMELINE, "")
    if not directory or phases.timeline is not None:
        return
    attempt = os.environ.get(_RESTART_COUNT, "0")
    try:
        timeline = RankTimeline(Path(directory), rank, phases, int(attempt))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{TIMELINE}={directory}: rank {rank} cannot write its timeline there: {error}. Give a "
            "directory that it can make or write to, or unset the variable"
        ) from error
    pid = os.getpid()

    def close() -> None:
        # Not in a child that the rank has forked.
        if os.getpid() == pid:
            timeline.close()

    atexit.register(close)


def flush(phases: Phases) -> None:
    """Writes what is recorded, if anything is, before the process ends without Python's help."""
    if phases.timeline is not None:
        phases.timeline.flush()
