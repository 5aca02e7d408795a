"""What runs leave in files: LogReport's log, the events of a launcher, a plan."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

LOG = "log"
"""The name that LogReport gives its file."""


class RecordError(Exception):
    """A file is missing, or is none of what can be drawn; says which, and what to do."""


class Log(NamedTuple):
    """What LogReport has written: the values of each report by key."""

    name: str
    rows: list[dict[str, Any]]


class Events(NamedTuple):
    """What `smorms3-dist run --events` has written, in the order of time."""

    name: str
    events: list[dict[str, Any]]


class Prediction(NamedTuple):
    """What `smorms3-dist plan --json` has printed: bytes of a rank by what they are for."""

    name: str
    memory: dict[str, int]
    on_host: bool


@dataclasses.dataclass
class Records:
    """All that was found, of each kind in the order in which it was named."""

    logs: list[Log] = dataclasses.field(default_factory=list)
    events: list[Events] = dataclasses.field(default_factory=list)
    plans: list[Prediction] = dataclasses.field(default_factory=list)

    def add(self, record: Log | Events | Prediction) -> None:
        """Adds one of any kind."""
        kinds: dict[type, list[Any]] = {Log: self.logs, Events: self.events, Prediction: self.plans}
        kinds[type(record)].append(record)


def read(paths: Iterable[Path]) -> Records:
    """Reads results: files, and directories in which some are.

    Of a directory it takes the file ``log``, and those that end in ``.json`` and ``.jsonl``, if
    they are of a kind that is known.

    Raises:
        RecordError: If one is missing or cannot be read, or is a file of no known kind; or if a
            directory has nothing that can be drawn.
    """
    records = Records()
    paths = list(dict.fromkeys(paths))
    folders = Counter(path.resolve().name for path in paths)
    for path in paths:
        if not path.is_dir():
            found = _read_file(path, str(path))
            if found is None:
                raise RecordError(
                    f"{path} is neither a log of LogReport, nor events of smorms3-dist run "
                    "--events, nor a plan of smorms3-dist plan --json"
                )
            records.add(found)
            continue
        names = [LOG, *sorted(p.name for p in path.iterdir() if p.suffix in (".json", ".jsonl"))]
        files = [path / name for name in dict.fromkeys(names) if (path / name).is_file()]
        folder = path.resolve().name
        # As it was given, where its last part alone would not tell.
        name = folder if folders[folder] == 1 else str(path)
        read = [record for file in files if (record := _read_file(file, name)) is not None]
        if not read:
            raise RecordError(
                f"{path} has no log of LogReport, no events and no plan: give the trainer's "
                "directory, or the files themselves"
            )
        for record in read:
            records.add(record)
    return records


def _read_file(path: Path, name: str) -> Log | Events | Prediction | None:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise RecordError(f"{path} cannot be read: {reason}") from error
    try:
        content = json.loads(text)
    except ValueError:
        return _events_of(text, name)
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        is_log = all("iteration" in row or "epoch" in row for row in content)
        return Log(name, content) if is_log and content else None
    if not isinstance(content, dict):
        return None
    if _is_event(content):
        return Events(name, [content])
    memory, training = content.get("memory"), content.get("training")
    if isinstance(memory, dict) and isinstance(training, dict):
        return Prediction(name, memory, training.get("transport") == "host")
    return None


def _events_of(text: str, name: str) -> Events | None:
    """Events, a line each. The last line may be one of which a part is missing."""
    lines = [line for line in text.splitlines() if line.strip()]
    events = []
    for number, line in enumerate(lines):
        try:
            event = json.loads(line)
        except ValueError:
            if number < len(lines) - 1:
                return None
            continue
        if not _is_event(event):
            return None
        events.append(event)
    return Events(name, sorted(events, key=lambda event: event["time"])) if events else None


def _is_event(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and isinstance(content.get("event"), str)
        and isinstance(content.get("time"), (int, float))
    )
