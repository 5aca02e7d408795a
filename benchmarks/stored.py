"""Results that are stored: of each part the newest run counts that has it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import RESULTS

Result = Mapping[str, Any]


def stored(files: Sequence[Path] = ()) -> list[Result]:
    """The results in these files, by default in all that are stored."""
    return [json.loads(path.read_text()) for path in files or sorted(RESULTS.glob("*-suite.json"))]


def newest_of_parts(results: Sequence[Result]) -> dict[str, Result]:
    """Of each part the newest result that has it, the newest of all first."""
    of_part: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: result["machine"]["started"], reverse=True):
        for part in dict.fromkeys(run["part"] for run in result["runs"]):
            of_part.setdefault(part, result)
    return of_part


def merged(of_part: Mapping[str, Result]) -> Result:
    """One result of the runs of each part, from a machine as the newest has it."""
    runs = [
        run for part, result in of_part.items() for run in result["runs"] if run["part"] == part
    ]
    return {**next(iter(of_part.values())), "runs": runs}
