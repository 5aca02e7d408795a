"""``smorms3-dist timeline``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from smorms3_dist.command_line import Parser
from smorms3_dist.timeline.merging import NoTimelineError, merge
from smorms3_dist.whole_files import replacing
from smorms3_dist.wording import ranks_in_words

_DESCRIPTION = """\
Bring the timelines that ranks have written into a directory, because of SMORMS3_TIMELINE or
smorms3-dist run --timeline, together in one file, on one clock. ui.perfetto.dev and
chrome://tracing open it.
"""


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`."""
    options = make_parser(program).parse_args(arguments)
    try:
        merged = merge(options.directory)
    except NoTimelineError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    output = options.output or options.directory / "timeline.json"
    try:
        with replacing(output) as temporary:
            temporary.write_text(merged.as_json())
    except OSError as error:
        print(
            f"{program}: error: {output} cannot be written: {error.strerror or error}",
            file=sys.stderr,
        )
        return 1
    apart = "clocks are not aligned: some rank has made no step"
    if merged.uncertainty is not None:
        apart = f"clocks are aligned to {merged.uncertainty * 1e6:.0f} us"
    print(
        f"{output}: {ranks_in_words(merged.ranks)}, {len(merged.events):,} events, "
        f"{merged.seconds:.1f} s; {apart}. Open it in ui.perfetto.dev or chrome://tracing"
    )
    if merged.left_out:
        print(f"{ranks_in_words(merged.left_out)}: of an earlier job, left out", file=sys.stderr)
    if merged.skipped:
        print(f"{merged.skipped} lines of the launcher's events are none", file=sys.stderr)
    return 0


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    parser = Parser(prog=program, description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory")
    merged_file = "the file to write, by default timeline.json in the directory"
    parser.add_argument("--output", type=Path, metavar="FILE", help=merged_file)
    return parser
