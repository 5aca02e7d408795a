"""``smorms3-dist completion SHELL``: prints a script by which a shell completes command lines."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smorms3_dist import cli
from smorms3_dist.command_line import Parser

_SHELLS = ("bash", "zsh", "fish", "tcsh")


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`."""
    options = make_parser(program).parse_args(arguments)
    try:
        import shtab
    except ModuleNotFoundError:
        text = "shtab is not installed: pip install 'smorms3-dist[completion]'"
        print(f"{program}: {text}", file=sys.stderr)
        return 1
    print(shtab.complete(_all_commands(shtab.FILE), options.shell))
    return 0


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    parser = Parser(
        prog=program,
        description="Print a script by which a shell completes commands and options: eval "
        f'"$({program} bash)" in ~/.bashrc, or a file _smorms3-dist in the fpath of zsh.',
    )
    parser.add_argument("shell", choices=_SHELLS, metavar="SHELL", help=", ".join(_SHELLS))
    return parser


def _all_commands(file: Any) -> Parser:
    """The parsers of all commands as one, in which some options are marked to be a `file`."""
    parser = Parser(prog="smorms3-dist")
    commands = parser.add_subparsers()
    for name, (module, what) in cli.COMMANDS.items():
        commands.add_parser(name, help=what)
        made = importlib.import_module(module).make_parser(f"{parser.prog} {name}")
        commands.choices[name] = made
        if name == "run":
            made.add_argument("script", nargs="?", help="the script").complete = file
    for action in parser.options().values():
        if action.type is Path:
            action.complete = file  # type: ignore[attr-defined]
    return parser
