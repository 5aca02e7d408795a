"""Runs tests/programs/checkpoints.py on MPI ranks, and looks at what it has left."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files import verify
from smorms3_dist.checkpoint.files.steps import PASSING, Steps

import mpirun
import process

LIMIT = 90
_MARK = "report: "


@dataclasses.dataclass
class Outcome:
    """What a job has come to: its exit status, and everything that it has written."""

    status: int
    output: str

    def reports(self, event: str, name: str = "") -> list[dict[str, Any]]:
        """What the ranks have reported of an event of a training, by rank."""
        lines = [line for line in self.output.splitlines() if line.startswith(_MARK)]
        found = [json.loads(line.removeprefix(_MARK)) for line in lines]
        mine = [r for r in found if (r["event"], r.get("name", "")) == (event, name)]
        return sorted(mine, key=lambda values: values["rank"])

    def facts(self, name: str = "") -> list[dict[str, Any]]:
        """What there is to know of a training that has ended, by rank."""
        assert self.status == 0, self.output
        found = self.reports("end", name)
        assert found, self.output
        passing = ("name", "said", "stalled")
        return [{k: v for k, v in values.items() if k not in passing} for values in found]


def job(path: Path, **options: Any) -> dict[str, Any]:
    """A training with one directory; see `Training` of the program for the rest."""
    return {"directories": [str(path)], **options}


def command(
    ranks: int, out: Path, *trainings: dict[str, Any], ignored: Sequence[str] = ()
) -> list[str]:
    """The command line of trainings, one after the other; some deprecations may be ignored."""
    options = ["-Werror", *(f"-Wignore:{words}:DeprecationWarning" for words in ignored)]
    program = (mpirun.PROGRAMS / "checkpoints.py", out, *map(json.dumps, trainings))
    return mpirun.command(ranks, *options, *program)


def outcome_of(command: Sequence[str], limit: float = LIMIT) -> Outcome:
    """Runs a command to whatever end it comes to."""
    return Outcome(*process.run(*command, env=mpirun.environment(), limit=limit))


def run(ranks: int, out: Path, *trainings: dict[str, Any]) -> Outcome:
    """Runs trainings to whatever end they come to."""
    return outcome_of(command(ranks, out, *trainings))


def expect(ranks: int, out: Path, *trainings: dict[str, Any]) -> Outcome:
    """Runs trainings that are to come to a good end."""
    outcome = run(ranks, out, *trainings)
    assert outcome.status == 0, outcome.output
    return outcome


def fork_command(ranks: int, out: Path, *trainings: dict[str, Any]) -> list[str]:
    """The command line of trainings on forked ranks without MPI, each with ranks of its own."""
    program = (sys.executable, "-W", "error", mpirun.PROGRAMS / "checkpoints.py")
    return [*map(str, (*program, out, "--fork", ranks)), *map(json.dumps, trainings)]


def fork(ranks: int, out: Path, *trainings: dict[str, Any]) -> Outcome:
    """Runs trainings to the end that is expected of each, on forked ranks without MPI."""
    outcome = outcome_of(fork_command(ranks, out, *trainings))
    assert outcome.status == 0, outcome.output
    return outcome


class Job:
    """A training that goes on while the test does something else."""

    def __init__(self, ranks: int, out: Path, training: dict[str, Any]) -> None:
        self._output = ""
        self.process: subprocess.Popen[str] = process.start(
            *command(ranks, out, training), env=mpirun.environment()
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
        self.process.communicate()

    def wait_for(self, event: str) -> dict[str, Any]:
        """Waits until a rank reports an event."""
        alarm = threading.Timer(LIMIT, os.killpg, (self.process.pid, 9))
        alarm.start()
        try:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                self._output += line
                if line.startswith(_MARK):
                    values = json.loads(line.removeprefix(_MARK))
                    if values["event"] == event:
                        return dict(values)
        finally:
            alarm.cancel()
        raise AssertionError(f"no {event}:\n{self._output}")

    def finish(self) -> Outcome:
        """Waits for the end."""
        status, rest = process.finish(self.process, LIMIT)
        return Outcome(status, self._output + rest)


def whole_steps(path: Path, host: str | None = None) -> list[int]:
    """The steps of a directory, which has no others, and whose bytes are all as they should be."""
    directory = Steps(path, host)
    assert directory.damaged() == {}
    steps = directory.steps()
    for step in steps:
        assert list(verify(directory, step)) == []
    return steps


def debris(path: Path) -> set[str]:
    """What saves that did not come to their end have left."""
    return {name for name in os.listdir(path) if PASSING.fullmatch(name)}
