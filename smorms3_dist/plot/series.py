"""What a picture shows, picked out of records: numbers by iteration, and the lives of jobs."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple, TypeGuard

from smorms3_dist.plot.records import Events, Log

PREFIX = "smorms3/"
"""What the keys of StepReport begin with."""

PHASES = ("compute", "agree", "layout", "reduce", "hooks", "update", "gather", "checkpoint")
"""The phases of a step, as they are stacked; others that a log has come on top."""

_SECONDS = re.compile(re.escape(PREFIX) + r"\w+(?<!_per)_s")
_RANK = re.compile(re.escape(PREFIX) + r"rank(\d+)/(\w+)")
_BEGINS = ("start", "restart")
_ENDS = ("failure", "end")


class Series(NamedTuple):
    """Numbers by iteration.

    Attributes:
        key: What they are of.
        iterations: Where they were reported; in ascending order.
        values: The numbers; nan where they are not finite.
    """

    key: str
    iterations: list[float]
    values: list[float]


def named(log: Log, word: str) -> list[Series]:
    """The series whose keys end in a word, such as ``loss``, in the order of the log."""
    keys = dict.fromkeys(key for row in log.rows for key in row)
    wanted = (key for key in keys if not key.startswith(PREFIX) and key.endswith(word))
    return [series for key in wanted if (series := series_of(log, key)).values]


def series_of(log: Log, key: str) -> Series:
    """The series of a key; empty if the log does not have it."""
    iterations: list[float] = []
    values: list[float] = []
    for number, row in enumerate(log.rows, 1):
        value = row.get(key)
        iteration = row.get("iteration", number)
        if _is_number(value) and (not iterations or iteration > iterations[-1]):
            iterations.append(iteration)
            values.append(float(value) if math.isfinite(value) else math.nan)
    return Series(key, iterations, values)


def phases(log: Log) -> list[Series]:
    """The seconds of each phase of a step that takes any, where all are reported together."""
    rows = [row for row in log.rows if f"{PREFIX}step_s" in row]
    keys = {key for row in rows for key in row if _SECONDS.fullmatch(key)}
    known = [f"{PREFIX}{phase}_s" for phase in PHASES]
    others = sorted(keys - {*known, f"{PREFIX}step_s"})
    filled = [{**dict.fromkeys(keys, 0.0), **row} for row in rows]
    found = [series_of(Log(log.name, filled), key) for key in (*known, *others) if key in keys]
    return [series for series in found if any(value > 0 for value in series.values)]


def by_rank(log: Log, key: str) -> dict[str, float]:
    """The last report of a number of each rank; of a log without, that of all ranks."""
    for row in reversed(log.rows):
        ranks = {
            match[1]: float(value)
            for name, value in row.items()
            if (match := _RANK.fullmatch(name)) and match[2] == key and _is_number(value)
        }
        if ranks:
            return dict(sorted(ranks.items(), key=lambda item: int(item[0])))
        if _is_number(row.get(PREFIX + key)):
            return {"most": float(row[PREFIX + key])}
    return {}


class Lifetime(NamedTuple):
    """A job from a start to its end, or to the last that is known of it; times are in seconds.

    Attributes:
        start: When it began, since the first event; after the pause that a restart makes.
        stop: When it ended.
        marks: What happened, as the events call it, and when.
    """

    start: float
    stop: float
    marks: list[tuple[str, float]]


def attempts(events: Events) -> list[Lifetime]:
    """The attempts of a job: it starts, and is started again."""
    first = events.events[0]["time"]
    found: list[Lifetime] = []
    for event in events.events:
        kind, time = re.sub(r"[_-]", " ", event["event"]), event["time"] - first
        just_begun = bool(found) and found[-1].marks[-1][0] in _BEGINS
        if (kind in _BEGINS and not just_begun) or not found:
            pause = event.get("pause", 0)
            begin = time + (pause if _is_number(pause) else 0)
            found.append(Lifetime(begin, begin, []))
        last = found[-1]
        # What comes after the end of an attempt is no part of its life.
        if not any(kind in _ENDS for kind, _ in last.marks):
            found[-1] = last._replace(stop=max(time, last.stop))
        last.marks.append((kind, time))
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
