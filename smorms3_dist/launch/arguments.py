"""The command line of ``smorms3-dist run``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.command_line import Parser
from smorms3_dist.launch.addresses import is_interface
from smorms3_dist.launch.environment import local_ranks
from smorms3_dist.launch.hosts import Host, HostsError, parse_hosts, read_hostfile, with_ranks
from smorms3_dist.launch.run_module import python_command
from smorms3_dist.launch.sources import divided, merged, shown
from smorms3_dist.optimizer.options import OPTIONS, read_options
from smorms3_dist.timeline.merging import LAUNCHER_EVENTS

_DESCRIPTION = """\
Start a script, unmodified, on several ranks with mpirun or srun, show what they print, and end with
the status of the rank that failed first. Chainer is made to work on the installed versions of
Python and NumPy, and a rank that fails ends the job.
"""

_EPILOG = """\
signals:
  SIGTERM, SIGUSR1  once: the ranks save a checkpoint after the step that they are in, where the
                    script has a ShardedCheckpoint, and end with status 75. Again: the job ends now
  Ctrl-C            the job ends now
  Ctrl-\\            every rank prints its Python stacks, and goes on

exit status:
  0      all ranks have ended well
  75     they have saved a checkpoint, because they were asked to, and ended; or they were asked to
         before they had started
  124    --timeout or --start-timeout was over, or no step was made for --stall-timeout
  128+N  signal N has ended the job, or the rank that failed first
  2      the command line is wrong, or the job cannot be started like this
  1      a rank or a host has vanished
  else   that of the rank that failed first

examples:
  smorms3-dist run -n 4 train.py --epoch 20
  smorms3-dist run -n 4 --shard train_mnist.py
  smorms3-dist run -H h1:8,h2:8 --gpus-per-node 8 -m my.training
  smorms3-dist run -n 4 --checkpoint-dir ck --max-restarts 3 --stall-timeout 300 train.py
  smorms3-dist run -n 2 -- ./program --its-option
"""

AUTO = "auto"
"""The number of ranks that hosts, the allocation, or this machine's GPUs or cores are for."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says: what every rank runs, and the options; see their help.

    `environment` has values that the user has given, `named` all names that go to other hosts.
    There is a number of `ranks`, or of `ranks_per_host`. ``None`` is a limit that is not there, and
    what hosts, the allocation or the job say by itself.
    """

    command: tuple[str, ...]
    is_python: bool
    ranks: int | str | None
    ranks_per_host: int | None
    hosts: tuple[Host, ...] | None
    gpus_per_node: int | None
    environment: dict[str, str]
    named: tuple[str, ...]
    bind_to: str
    mpi_args: tuple[str, ...]
    backend: str
    interfaces: tuple[str, ...]
    dry_run: bool
    tee: str
    timestamps: bool
    log_dir: Path | None
    events: Path | None
    max_restarts: int
    min_ranks: int | None
    checkpoint_dir: Path | None
    timeline: Path | None
    start_timeout: float
    stall_timeout: float | None
    timeout: float | None
    launcher_timeout: float


def parse(arguments: Sequence[str], program: str) -> Options:
    """Reads a command line, given without the program's name; exits if it is wrong."""
    parser = make_parser(program)
    own, kind, command = _split(list(arguments), parser)
    found, given = merged(parser, own, os.environ)
    if found.show_config:
        print(shown(parser, found, given))
        parser.exit()
    try:
        hosts = _hosts(found)
    except HostsError as error:
        parser.error(str(error))
    if not command:
        parser.error("no script is given")
    python = python_command("smorms3_dist")
    if found.shard is not None:
        if kind == "command":
            parser.error("--shard is for scripts and modules, and what follows -- is neither")
        python.append(f"--shard={found.shard}" if found.shard else "--shard")
    if kind == "script":
        if not Path(command[0]).is_file():
            parser.error(f"there is no script {command[0]!r} in {Path.cwd()}")
        command = [*python, command[0] if os.sep in command[0] else f"./{command[0]}", *command[1:]]
    elif kind == "module":
        command = [*python, "-m", *command]
    if found.min_ranks is not None and not found.max_restarts:
        parser.error("--min-ranks says with how many ranks to start again: give --max-restarts")
    for name, slots in hosts or ():
        if slots > (found.gpus_per_node or slots):
            parser.error(f"{name} has {slots} slots, more than its {found.gpus_per_node} GPUs")
    total = None if hosts is None else sum(host.slots for host in hosts)
    if isinstance(found.ranks, int) and total is not None and found.ranks > total:
        parser.error(f"{found.ranks} ranks are more than the {total} slots of the hosts")
    taken = {field.name for field in dataclasses.fields(Options)} & vars(found).keys()
    if found.timeline is not None:
        found.timeline = found.timeline.absolute()
        found.events = found.events or found.timeline / LAUNCHER_EVENTS
    return Options(
        **{name: getattr(found, name) for name in taken - {"hosts", "checkpoint_dir"}},
        command=tuple(command),
        is_python=kind != "command",
        hosts=None if hosts is None else tuple(hosts),
        environment=dict(entry.split("=", 1) for entry in found.variables if "=" in entry),
        named=tuple(entry.partition("=")[0] for entry in found.variables),
        checkpoint_dir=None if found.checkpoint_dir is None else found.checkpoint_dir.absolute(),
    )


def _split(arguments: list[str], parser: Parser) -> tuple[list[str], str, list[str]]:
    """Divides a command line: the options, what kind of command follows, and the command."""
    _, end = divided(arguments, parser.options())
    own, rest = arguments[:end], arguments[end:]
    if rest and rest[0] in ("--", "-m"):
        return own, "module" if rest[0] == "-m" else "command", rest[1:]
    return own, "script", rest


def _hosts(found: argparse.Namespace) -> list[Host] | None:
    slots = found.ranks_per_host or found.gpus_per_node or 1
    if found.hosts is not None:
        hosts = parse_hosts(found.hosts, slots)
    elif found.hostfile is not None:
        hosts = read_hostfile(found.hostfile, slots)
    else:
        return None
    return hosts if found.ranks_per_host is None else with_ranks(hosts, found.ranks_per_host)


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    parser = Parser(
        prog=program,
        usage=f"{program} [options] SCRIPT [ARGS...]\n"
        f"       {program} [options] -m MODULE [ARGS...]\n"
        f"       {program} [options] -- COMMAND [ARGS...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    number: dict[str, Any] = {"type": _from(1), "metavar": "N"}
    directory: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    limit: dict[str, Any] = {"type": seconds, "metavar": "S"}
    group = parser.add_argument_group("where")
    ranks = group.add_mutually_exclusive_group()
    ranks.add_argument(
        *("-n", "-np", "--ranks", "--np"),
        type=_ranks,
        metavar="N",
        help="number of ranks; auto, as if not given: all slots of the hosts or the allocation; or "
        "else with auto: a rank for each GPU of this host, or for each core that it may use",
    )
    ranks.add_argument(
        *("--nproc-per-node", "--nproc_per_node"),
        dest="ranks_per_host",
        type=_ranks_per_host,
        metavar="N",
        help="number of ranks on each host, or auto, gpu or cpu: by what this one has",
    )
    hosts = group.add_mutually_exclusive_group()
    hosts.add_argument("-H", "--hosts", metavar="HOST:SLOTS,...", help="hosts, reached by ssh")
    hosts.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts, one a line")
    add = group.add_argument
    add(
        "--gpus-per-node",
        **number,
        help="GPUs that each host must have; as many ranks go there if nothing else is said",
    )
    add(
        "--backend",
        choices=("auto", "mpirun", "slurm"),
        default="auto",
        help="what starts the ranks; auto: srun where Slurm offers PMIx, else mpirun",
    )
    by_which = "by which ranks talk, or networks such as 10.0.0.0/24 (those that connect the hosts)"
    add(
        "--network-interface",
        dest="interfaces",
        type=_interfaces,
        default=(),
        metavar="NAME,...",
        help=by_which,
    )
    add = parser.add_argument_group("how").add_argument
    add(
        "--shard",
        nargs="?",
        const="",
        type=_shard_options,
        metavar="=OPTIONS",
        help="shard what chainermn.create_multi_node_optimizer makes, in a script that knows "
        f"nothing of it; OPTIONS are NAME=VALUE,... of {', '.join(OPTIONS)}",
    )
    add(
        *("-x", "--env"),
        dest="variables",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="pass an environment variable on to other hosts; those of Python, Chainer, CuPy, NCCL "
        "and OpenMP go there anyway",
    )
    add("--bind-to", default="none", metavar="WHAT", help="bind ranks to core, socket, ... (none)")
    more = "more arguments for mpirun or srun"
    add("--mpi-args", type=_words, default=(), metavar="'ARGS'", help=more)
    add("--dry-run", action="store_true", help="print the command, and do nothing")
    file = 'take options from a TOML file, such as tee = "0"; SMORMS3_RUN_TEE=0 counts more'
    add("--config", type=Path, metavar="FILE", help=file)
    add("--show-config", action="store_true", help="print the options that hold, and from where")
    add = parser.add_argument_group("what is shown").add_argument
    tee = "ranks to show on the terminal: all, none, or such as 0,4-7 (%(default)s)"
    add("--tee", type=_rank_list, default="all", metavar="RANKS", help=tee)
    add("--timestamps", action="store_true", help="the time before each line, here and in files")
    keep = "keep a file for each rank, in a directory there that is new for each run"
    add("--log-dir", **directory, help=keep)
    lines = (
        "append what happens to the job to a file, as JSON lines; with --timeline by default "
        f"{LAUNCHER_EVENTS} there"
    )
    add("--events", type=Path, metavar="FILE", help=lines)
    when = "let each rank write what it does when, for smorms3-dist timeline DIR"
    add("--timeline", **directory, help=when)
    add = parser.add_argument_group("failures").add_argument
    add(
        "--max-restarts",
        type=_from(0),
        default=0,
        metavar="N",
        help="start again, up to N times, after a failure; the script goes on from its checkpoint",
    )
    fewer = "start again on fewer ranks, down to N, when hosts are gone"
    add("--min-ranks", **number, help=fewer)
    script = "for the script, in SMORMS3_CHECKPOINT_DIR; ShardedCheckpoint() takes it from there"
    add("--checkpoint-dir", **directory, help=script)
    add = parser.add_argument_group("limits, in seconds").add_argument
    start = "until all ranks have started (%(default)g)"
    add("--start-timeout", **limit, default=120.0, help=start)
    stall = "without a step of the optimizer, or a line of a rank that has made none yet"
    add("--stall-timeout", **limit, help=stall)
    add("--timeout", **limit, help="for the whole job")
    alone = "that ranks go on while the launcher is stopped, as by Ctrl-Z (%(default)g)"
    add("--launcher-timeout", **limit, default=600.0, help=alone)
    return parser


def ranks_of(text: str, size: int) -> frozenset[int]:
    """The ranks of so many that ``--tee`` names: ``all``, ``none``, or such as ``0,4-7``.

    Those that are not there are left out.
    """
    if text in ("all", "none"):
        return frozenset(range(size) if text == "all" else ())
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), min(int(last or first), size - 1) + 1))
    return frozenset(found)


def check_ranks(text: str, size: int) -> None:
    """Raises a ValueError if ``--tee`` names ranks, or begins with them, that are not there."""
    for part in () if text in ("all", "none") else text.split(","):
        first = int(part.partition("-")[0])
        if first >= size:
            there = "rank 0 only" if size == 1 else f"ranks 0 to {size - 1}"
            raise ValueError(f"--tee {text}: there is no rank {first}; the job has {there}")


def _rank_list(text: str) -> str:
    if text not in ("all", "none") and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not all, none, or such as 0,4-7")
    return text


def _ranks(text: str) -> int | str:
    return AUTO if text == AUTO else _from(1)(text)


def _ranks_per_host(text: str) -> int:
    if text not in (AUTO, "gpu", "cpu"):
        return _from(1)(text)
    if found := local_ranks(text):
        return found
    raise argparse.ArgumentTypeError("this host has no GPU")


def _shard_options(text: str) -> str:
    try:
        read_options(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _variable(text: str) -> str:
    name = text.partition("=")[0]
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise argparse.ArgumentTypeError(f"{name!r} is not the name of a variable")
    return text


def _interfaces(text: str) -> tuple[str, ...]:
    for word in text.split(","):
        if not is_interface(word):
            raise argparse.ArgumentTypeError(f"{word!r} is no name of an interface, nor a network")
    return tuple(text.split(","))


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _from(least: int) -> Callable[[str], int]:
    """What reads a whole number that is at least so much."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return number


def seconds(text: str) -> float:
    """Reads a number of seconds above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
