"""Brings timelines of all ranks together, on rank 0's clock, with what the launcher has told."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smorms3_dist.timeline.trace_file import read_events

LAUNCHER_EVENTS = "events.jsonl"
"""What the launcher has told: objects with ``time``, in seconds since 1970, and ``event``."""

LAUNCHER = 1 << 24
"""The number that the launcher's track has, above those of all ranks."""

_Event = dict[str, Any]


class NoTimelineError(ValueError):
    """There is nothing to be merged."""


@dataclasses.dataclass
class Merged:
    """A timeline of all ranks.

    Attributes:
        events: Trace events; time is in microseconds since the first.
        ranks: The ranks.
        began: The time of the first event, in seconds since 1970, by rank 0's clock.
        seconds: The time from there to the end of the last.
        uncertainty: How far the clocks of ranks may be apart at most, in seconds; ``None`` if some
            rank has not told, because it had made no step.
        left_out: Ranks of an earlier job in the same directory.
        skipped: Lines of the launcher's events that are none.
    """

    events: list[_Event]
    ranks: list[int]
    began: float = 0.0
    seconds: float = 0.0
    uncertainty: float | None = 0.0
    left_out: list[int] = dataclasses.field(default_factory=list)
    skipped: int = 0

    def as_json(self) -> str:
        """The file that viewers of trace events open."""
        told = {
            "began_unix_s": self.began,
            "clock_uncertainty_s": self.uncertainty,
            "ranks": self.ranks,
        }
        # An event a line, so that people can look for one, too.
        lines = ",\n".join(json.dumps(event) for event in self.events)
        return (
            f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(told)},\n'
            f'"traceEvents": [\n{lines}\n]}}\n'
        )


def merge(directory: Path) -> Merged:
    """Merges what lies in a directory.

    Raises:
        NoTimelineError: If no rank has written a timeline there.
    """
    found: dict[int, list[_Event]] = {}
    for path in sorted(directory.glob("rank-*.json")):
        name = re.fullmatch(r"rank-(\d+)(\.before)?", path.stem)
        if name is not None:
            found[int(name[1])] = read_events(directory / f"rank-{name[1]}.json")
    found = {rank: events for rank, events in sorted(found.items()) if events}
    if not found:
        raise NoTimelineError(
            f"{directory} has no timeline of any rank (rank-0.json, ...): they are written where "
            "SMORMS3_TIMELINE, or smorms3-dist run --timeline, says so"
        )
    merged = Merged([], [])
    began = 0.0
    for rank, events in found.items():
        aligned = list(_aligned(events, merged))
        starts = [event["ts"] for event in aligned if event["name"] == "rank_start"]
        if rank == 0 and starts:
            began = min(starts)
        if max(map(_end, aligned)) < began:
            merged.left_out.append(rank)
            continue
        merged.ranks.append(rank)
        merged.events += aligned
    merged.events += _of_launcher(directory / LAUNCHER_EVENTS, merged)
    first = min(event["ts"] for event in merged.events)
    for event in merged.events:
        event["ts"] -= first
    # Viewers take the longer of two that begin together for the outer one if it comes first.
    merged.events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    merged.began = first / 1e6
    merged.seconds = max(map(_end, merged.events)) / 1e6
    return merged


def _end(event: _Event) -> float:
    return float(event["ts"] + event.get("dur", 0))


def _aligned(events: list[_Event], merged: Merged) -> Iterator[_Event]:
    """Events of one rank by rank 0's clock; what a file says of its ranks comes once."""
    offsets: dict[int, float] = {}
    for event in events:
        if event["name"] == "clock":
            offsets[event["args"]["attempt"]] = event["args"]["offset_s"]
            uncertainty = event["args"]["uncertainty_s"]
            if merged.uncertainty is not None:
                merged.uncertainty = max(merged.uncertainty, uncertainty)
    attempt, seen = 0, set()
    for event in events:
        if event["name"] == "rank_start":
            attempt = event["args"]["attempt"]
            if attempt not in offsets:
                merged.uncertainty = None
        # Quarters of a microsecond are what times since 1970 have: all stay as far apart.
        shifted = {**event, "ts": event["ts"] - round(offsets.get(attempt, 0.0) * 4e6) / 4}
        if event["ph"] != "M":
            yield shifted
            continue
        about = json.dumps([event["name"], event["tid"], event["args"]])
        if about in seen:
            continue
        seen.add(about)
        yield shifted
        if event["name"] == "rank_start" and attempt:
            restart = {"name": "restart", "cat": "event", "ph": "i", "s": "p"}
            yield {**shifted, **restart, "args": {"detail": f"attempt {attempt}"}}


def _of_launcher(path: Path, merged: Merged) -> Iterator[_Event]:
    """What the launcher has told of the last job in its file, which jobs append to."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    told: list[tuple[float, str, dict[str, Any]]] = []
    for line in lines:
        try:
            facts = json.loads(line)
            time, event = float(facts.pop("time")), str(facts.pop("event"))
        except (ValueError, KeyError, TypeError, AttributeError):
            merged.skipped += 1
            continue
        if event == "start":
            told.clear()
        told.append((time * 1e6, event, facts))
    where = {"pid": LAUNCHER, "tid": 0}
    for name, args in (
        ("process_name", {"name": "launcher"}),
        ("process_sort_index", {"sort_index": -1}),
    ):
        if told:
            yield {"name": name, "ph": "M", **where, "ts": told[0][0], "args": args}
    for ts, event, facts in told:
        kind = {"name": event, "cat": "launcher", "ph": "i", "s": "g"}
        yield {**kind, **where, "ts": ts, "args": facts}
