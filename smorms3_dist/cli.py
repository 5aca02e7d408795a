"""``smorms3-dist COMMAND ...``: finds the module of a command, and runs it.

Only that module is imported, and no command needs Chainer or MPI unless it says so.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from smorms3_dist import __version__
from smorms3_dist.command_line import Parser

COMMANDS = {
    "run": ("smorms3_dist.launch.commands", "start a script on several ranks"),
    "install-chainer": (
        "smorms3_dist.compat.chainer_install",
        "build and install Chainer, which needs an older setuptools for it",
    ),
    "demo": ("smorms3_dist.demo.commands", "train a small network on real digits, to see it work"),
    "doctor": ("smorms3_dist.doctor.commands", "check this host, and say what to mend"),
    "bench": ("smorms3_dist.bench.commands", "measure how fast this machine trains"),
    "plan": ("smorms3_dist.plan.commands", "say what a training will take of each rank"),
    "timeline": (
        "smorms3_dist.timeline.commands",
        "bring the timelines of all ranks together in one file",
    ),
    "plot": ("smorms3_dist.plot.commands", "draw what runs have written"),
    "checkpoint": (
        "smorms3_dist.checkpoint.tools.commands",
        "look at checkpoints, verify and export them",
    ),
    "completion": ("smorms3_dist.completion", "print what lets a shell complete commands"),
}
"""The module of each command, with `main` and `make_parser`, and what it is for."""

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: It, without the program's name; that of this process by default.

    Returns:
        The exit status: 0, also where no command is given and the help is printed; 1 if the
        command has failed; as of a shell, 130 if it was interrupted, and 141 if nobody reads what
        it says.

    Raises:
        SystemExit: With status 2, if the command line is wrong, and with 0 after ``--help`` and
            ``--version``.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        print(
            "smorms3-dist: error: stdout is closed: send it to a file, or /dev/null",
            file=sys.stderr,
        )
        return 1
    parser = Parser(
        prog="smorms3-dist",
        usage="smorms3-dist COMMAND ...\n       smorms3-dist COMMAND --help",
        description="Tools for distributed training with smorms3_dist.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:16} {what}" for name, (_, what) in COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=f"{parser.prog} {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", nargs="?", help="see below")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in ([], ["--"]):
        parser.print_help()
        return 0
    if Path(words[0]).suffix == ".py":
        parser.error(f"{words[0]} is no command; did you mean {parser.prog} run {words[0]}?")
    # What follows the command is its own business: argparse would take a first "--" away.
    command = parser.parse_args(words[:1]).command
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and parameters that the terminal has no letters for.
        sys.stdout.reconfigure(errors="backslashreplace")
    module = importlib.import_module(COMMANDS[command][0])
    try:
        status = module.main(words[1:], f"{parser.prog} {command}")
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except OSError as error:
        # Nothing more is to be written to it when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return _BROKEN_PIPE
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
