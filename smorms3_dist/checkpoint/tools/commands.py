"""``smorms3-dist checkpoint``: the command line of checkpoints, for which no MPI is needed."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.steps import Steps
from smorms3_dist.checkpoint.files.strict_json import LARGEST
from smorms3_dist.checkpoint.tools import reports
from smorms3_dist.checkpoint.tools.exporting import export
from smorms3_dist.checkpoint.tools.progress import Line, Progress
from smorms3_dist.checkpoint.tools.reports import printable
from smorms3_dist.checkpoint.tools.weights import FORMATS, export_weights
from smorms3_dist.command_line import Parser

_Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line.

    Returns:
        The exit status: 0, or 1 if something is wrong with a checkpoint, or two differ.

    Raises:
        SystemExit: With status 2, if the command line is wrong.
    """
    options = make_parser(program).parse_args(arguments)
    try:
        return options.run(options)
    except CheckpointError as error:
        print(f"{program}: error: {printable(str(error))}", file=sys.stderr)
        return 1


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    parser = Parser(
        prog=program,
        description="Looks at sharded checkpoints, checks and exports them. Steps that are whole "
        "can be loaded by any number of ranks as they are.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: _Run, what: str, more: str = "") -> argparse.ArgumentParser:
        text = f"{what[0].upper()}{what[1:]}. {more}"
        command = commands.add_parser(name, help=what, description=text)
        command.set_defaults(run=run, error=command.error)
        return command

    command = add("list", _list, "list the steps of a directory")
    _add_directory(command)
    _add_json(command)

    command = add("inspect", _inspect, "show what is in a step")
    _add_directory(command)
    _add_step(command, "the step; by default the newest that is whole")
    _add_json(command)

    command = add(
        "verify",
        _verify,
        "read steps and compare their checksums",
        "The exit status is 1 if anything is wrong.",
    )
    _add_directory(command)
    which = command.add_mutually_exclusive_group()
    _add_step(which, "the step; by default the newest, whole or not")
    which.add_argument("--all", action="store_true", help="all steps")
    _add_json(command)
    _add_progress(command)

    command = add(
        "diff",
        _diff,
        "compare the parameters and states of two steps",
        "The exit status is 1 if they differ. In one directory, both steps must be given.",
    )
    _add_directory(command)
    command.add_argument(
        "other", metavar="OTHER", nargs="?", type=Path, help="another directory; by default DIR"
    )
    _add_step(command, "the step of DIR; by default the newest that is whole")
    command.add_argument(
        "--other-step", metavar="N", type=_step, help="the step of OTHER; by default likewise"
    )
    _add_json(command)
    _add_progress(command)

    command = add(
        "export",
        _export,
        "write a step as a Chainer snapshot, or its weights for other libraries",
        "Parameters and states are whole; everything else is that of rank 0. safetensors and torch "
        "have the weights alone: parameters, and what links keep beside them, such as statistics "
        "of batch normalizations.",
    )
    _add_directory(command)
    command.add_argument("out", metavar="OUT", type=Path, help="the file, which must not exist")
    _add_step(command, "the step; by default the newest that is whole")
    command.add_argument(
        "--format",
        choices=("npz", *FORMATS),
        help="by default what the name of the file ends in (.npz, .safetensors, .pt, .pth), else "
        "npz; torch needs PyTorch",
    )
    command.add_argument("--compress", action="store_true", help="compress the arrays of an npz")
    _add_tied(command)
    _add_progress(command)
    return parser


_Adds = argparse.ArgumentParser | argparse._MutuallyExclusiveGroup


def _add_directory(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", metavar="DIR", type=Path, help="the directory of the steps")


def _add_step(command: _Adds, what: str) -> None:
    command.add_argument("--step", metavar="N", type=_step, help=what)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_progress(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--progress", action="store_true", help="show progress, also where stderr is no terminal"
    )


def _add_tied(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tied",
        metavar="SECOND=FIRST",
        action="append",
        default=[],
        type=_pair,
        help="a second path to a parameter, and the one by which checkpoints have it: the first "
        "in the order of the alphabet (may be repeated)",
    )


def _step(text: str) -> int:
    step = int(text)
    if not 0 <= step <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is no step")
    return step


def _pair(text: str) -> tuple[str, str]:
    second, found, first = text.partition("=")
    if not found or second == first:
        raise argparse.ArgumentTypeError(f"{text} is not SECOND=FIRST")
    return second, first


def _steps_of(path: Path) -> Steps:
    if not path.is_dir():
        raise CheckpointError(path, "is no directory")
    steps = Steps(path)
    if not steps.numbers():
        foreign = reports.foreign(path)
        if foreign is not None:
            raise CheckpointError(path, foreign)
    return steps


def _newest(directory: Steps) -> int:
    step = directory.latest()
    if step is None:
        damaged = "; ".join(f"step {n}: {error}" for n, error in directory.damaged().items())
        raise CheckpointError(
            directory.path, f"has no whole step: {damaged}" if damaged else "has no checkpoint"
        )
    return step


def _chosen(directory: Steps, step: int | None) -> int:
    return _newest(directory) if step is None else step


@contextlib.contextmanager
def _progress(options: argparse.Namespace, what: str) -> Iterator[Progress | None]:
    if options.progress or sys.stderr.isatty():
        with Line(what, sys.stderr) as line:
            yield line
    else:
        yield None


def _list(options: argparse.Namespace) -> int:
    steps = _steps_of(options.directory)
    reports.show(reports.listed(steps), options.json, reports.list_text)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    steps = _steps_of(options.directory)
    facts = reports.inspected(steps, _chosen(steps, options.step))
    reports.show(facts, options.json, reports.inspect_text)
    return 0


def _verify(options: argparse.Namespace) -> int:
    steps = _steps_of(options.directory)
    numbers = sorted([*steps.steps(), *steps.damaged()])
    if options.step is not None:
        numbers = [options.step]
    elif not options.all:
        numbers = numbers[-1:]
    if not numbers:
        raise CheckpointError(steps.path, "has no checkpoint")
    found = []
    for step in numbers:
        with _progress(options, f"verifying step {step}") as progress:
            found.append(reports.verified(steps, step, progress))
    reports.show(found, options.json, reports.verify_text)
    return int(any(each["problems"] for each in found))


def _diff(options: argparse.Namespace) -> int:
    if options.other is None and (options.step is None or options.other_step is None):
        options.error("one directory needs both --step and --other-step")
    first = _steps_of(options.directory)
    second = first if options.other is None else _steps_of(options.other)
    pairs = ((first, options.step), (second, options.other_step))
    (_, step), (_, other_step) = chosen = [(s, _chosen(s, number)) for s, number in pairs]
    with _progress(options, f"comparing steps {step} and {other_step}") as progress:
        found = reports.compared(*chosen[0], *chosen[1], progress)
    reports.show(found, options.json, reports.diff_text)
    return int(bool(found["differences"]))


def _export(options: argparse.Namespace) -> int:
    ending = options.out.suffix
    by_name = [name for name, endings in FORMATS.items() if ending in endings]
    form = options.format or next(iter(by_name), "npz")
    if options.compress and form != "npz":
        options.error(f"--compress is for npz, not for {form}")
    steps = _steps_of(options.directory)
    step = _chosen(steps, options.step)
    tied = dict(options.tied)
    with _progress(options, f"exporting step {step}") as progress:
        if form == "npz":
            why = "refers to parameters outside of models"
            left_out = export(
                steps, step, options.out, compress=options.compress, tied=tied, progress=progress
            )
        else:
            why = "is text"
            left_out = export_weights(steps, step, options.out, form, tied=tied, progress=progress)
    for key in left_out:
        print(f"left out, because it {why}: {printable(key)}", file=sys.stderr)
    what = "step" if form == "npz" else "weights of step"
    print(
        printable(
            f"{what} {step} of {steps.path} {'is' if form == 'npz' else 'are'} in {options.out}"
        )
    )
    return 0
