"""``smorms3-dist bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.bench import simulation, summary
from smorms3_dist.bench.suite import Case, Settings, cases, run
from smorms3_dist.bench.summary import PARTS
from smorms3_dist.command_line import Parser
from smorms3_dist.compat.chainer_install import refuse
from smorms3_dist.whole_files import replacing

_DESCRIPTION = """\
Measure how fast this machine trains: kernels, steps, hooks, rules, 1 to 8 ranks, whole steps and
starting, beside ChainerMN and plain Chainer in the same run. Nothing else should run meanwhile.
"""


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`.

    The status is 1 if a case has failed.
    """
    options = make_parser(program).parse_args(arguments)
    if options.simulate is not None:
        try:
            print("\n".join(simulation.told(options)))
        except simulation.NotRecorded as error:
            return refuse(program, str(error))
        return 0
    result = measured(options, [*cases()], None)
    print("\n" + summary.text(result))
    if options.output is not None:
        store(result, options.output)
    return 1 if result["failed"] else 0


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    parser = Parser(prog=program, description=_DESCRIPTION, allow_abbrev=False)
    add_arguments(parser, PARTS)
    simulation.add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser, parts: Iterable[str]) -> None:
    """Adds the options of measuring, for these parts."""
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases and steps: two minutes on two cores")
    add("--only", nargs="+", choices=list(parts), metavar="PART", help=f"of {', '.join(parts)}")
    add(
        "--rounds", type=_count, metavar="N", default=1, help="run everything N times; by default 1"
    )
    add("--output", type=_output, metavar="FILE", help="write all that was measured as JSON")


def measured(
    options: argparse.Namespace, known: Sequence[Case], folder: Path | None
) -> dict[str, Any]:
    """Runs those of the known cases that are asked for, and says of each how it went.

    Args:
        options: See `add_arguments`.
        known: The cases.
        folder: Where programs are started, if not here.
    """
    settings = Settings(options.quick, options.rounds, folder, getattr(options, "directory", None))
    unwanted = False if options.quick else "alone"
    chosen = [
        case
        for case in known
        if case.quick != unwanted and (not options.only or case.part in options.only)
    ]
    return run(chosen, settings, lambda line: print(line, file=sys.stderr, flush=True))


def store(result: dict[str, Any], path: Path) -> None:
    """Writes what was measured to a file, whole."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result) + "\n")


def _output(text: str) -> Path:
    """A file that can be written: to be known before it is measured for minutes."""
    path = Path(text)
    if path.is_dir() or not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
