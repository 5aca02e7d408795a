"""``smorms3-dist doctor``: looks at all that training needs, and says what to do about it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from smorms3_dist.command_line import Parser
from smorms3_dist.doctor.checks import all_checks
from smorms3_dist.doctor.findings import GREEN, RED, YELLOW, Check, Finding, examine
from smorms3_dist.launch.arguments import seconds
from smorms3_dist.launch.environment import make_home_known
from smorms3_dist.launch.hosts import HostsError, parse_hosts

_COLOURS = {GREEN: "32", YELLOW: "33", RED: "31"}
_STATUS_WIDTH = 8
_NAME_WIDTH = 17
_NARROWEST = 60


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`. The exit status is 1 if anything is red."""
    options = make_parser(program).parse_args(arguments)
    make_home_known()
    findings: dict[str, Finding] = {}
    for check in all_checks(options.timeout, with_jobs=not options.no_mpi, hosts=options.hosts):
        with _doing(check):
            findings[check.name] = examine(check)
        if not options.json:
            print(_text(check.name, findings[check.name]), flush=True)
    if options.json:
        listed = [{"name": name, **dataclasses.asdict(found)} for name, found in findings.items()]
        print(json.dumps(listed, indent=2))
    else:
        print(_conclusion(findings))
    return int(any(finding.status == RED for finding in findings.values()))


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    parser = Parser(
        prog=program,
        description="Looks at all that training needs on this host: Python and its packages, MPI "
        "and its launcher, GPUs, the machine; and runs a job of two ranks, which sums over them "
        "and trains a few steps beside plain Chainer. Green is as it should be; yellow works, but "
        "not as well as it could, or is not known; red does not work. The exit status is 1 if "
        "anything is red.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a JSON list of objects with name, status, found and remedy",
    )
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument("--no-mpi", action="store_true", help="run no job")
    jobs.add_argument(
        *("-H", "--hosts"),
        metavar="HOST,HOST,...",
        type=_hosts,
        default=(),
        help="run jobs between the first of these hosts and each other one, too, as smorms3-dist "
        "run does, and say by which network interfaces",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=60.0,
        help="how long the job may take before it is killed, which is red; by default %(default)g",
    )
    return parser


def _hosts(text: str) -> tuple[str, ...]:
    try:
        names = tuple(host.name for host in parse_hosts(text))
    except HostsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len(names) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is one host: give two or more")
    return names


@contextlib.contextmanager
def _doing(check: Check) -> Iterator[None]:
    """Says on a terminal what takes long, for as long as it does."""
    if not check.doing or not sys.stderr.isatty():
        yield
        return
    line = f"{check.doing} ..."
    print(line, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)


def _text(name: str, finding: Finding) -> str:
    indent = " " * (_STATUS_WIDTH + _NAME_WIDTH)
    head = f"{finding.status:{_STATUS_WIDTH}}{name:{_NAME_WIDTH - 1}} "
    lines = _wrapped(head, finding.found, indent)
    if finding.remedy:
        lines += _wrapped(f"{indent}-> ", finding.remedy, f"{indent}   ")
    text = "\n".join(lines)
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        status = f"\033[{_COLOURS[finding.status]}m{finding.status}\033[0m"
        text = status + text.removeprefix(finding.status)
    return text


def _wrapped(head: str, text: str, indent: str) -> list[str]:
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    if not sys.stdout.isatty():
        return [head + printable]
    return textwrap.wrap(
        printable,
        max(_NARROWEST, shutil.get_terminal_size().columns),
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _conclusion(findings: Mapping[str, Finding]) -> str:
    statuses = [finding.status for finding in findings.values()]
    reds, yellows = statuses.count(RED), statuses.count(YELLOW)
    if reds:
        return f"{reds} of {len(statuses)} checks are red, {yellows} yellow."
    if yellows:
        return f"Ready to train; {yellows} of {len(statuses)} checks are yellow."
    return "Ready to train."
