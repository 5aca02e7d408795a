"""The command line of ``smorms3-dist plot``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from smorms3_dist.command_line import Parser
from smorms3_dist.plot.drawing import draw
from smorms3_dist.plot.records import RecordError, read
from smorms3_dist.whole_files import replacing

_DESCRIPTION = """\
Draw what runs have written, as one picture: loss and accuracy; the time of a step by phase; how
ranks differ, in time and in memory, beside what a plan has foretold; the life of the job. It draws
what there is, and says what is missing. Needs matplotlib, and neither Chainer nor MPI.
"""

_EPILOG = """\
A RESULT is a trainer's directory, or a file:
  the log of LogReport, with the numbers of smorms3_dist.extensions.StepReport in it
  what smorms3-dist run --events FILE has written
  what smorms3-dist plan ... --json has printed
In a directory, these are found as log, *.jsonl and *.json.

examples:
  smorms3-dist plot result
  smorms3-dist plot result events.jsonl plan.json --out run.png
  smorms3-dist plot before/result after/result
"""

_ENDINGS = (".png", ".svg", ".pdf")


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    parser = Parser(
        prog=program,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", metavar="RESULT", nargs="+", type=Path, help="what to draw")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("plot.png"),
        help="the picture, by default plot.png; a name may also end in .svg or .pdf. It is "
        "replaced if it exists",
    )
    return parser


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`.

    The status is 1 if a result cannot be read, there is nothing to draw, or no matplotlib.
    """
    parser = make_parser(program)
    options = parser.parse_args(arguments)
    if options.out.suffix not in _ENDINGS:
        parser.error(f"--out {options.out} does not end in {', '.join(_ENDINGS)}")

    def fail(text: object) -> int:
        print(f"{program}: error: {text}", file=sys.stderr)
        return 1

    try:
        picture = draw(read(options.results))
    except RecordError as error:
        return fail(error)
    except ImportError as error:
        return fail(f"matplotlib cannot be imported: {error}. pip install 'smorms3-dist[plot]'")
    for words in picture.missing:
        print(f"not drawn: {words}", file=sys.stderr)
    if not picture.panels:
        return fail("there is nothing to draw")
    try:
        with replacing(options.out) as temporary:
            picture.figure.savefig(temporary)
    except OSError as error:
        return fail(f"{options.out} cannot be written: {error.strerror or error}")
    print(f"{options.out}: {', '.join(picture.panels)}")
    return 0
