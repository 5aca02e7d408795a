"""The command line of ``smorms3-dist plan``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import decimal
import json
import re
import sys
from collections.abc import Callable, Sequence

from smorms3_dist.command_line import Parser
from smorms3_dist.kernels.narrow import SENT_AS
from smorms3_dist.layout import ParameterSpec
from smorms3_dist.plan import report
from smorms3_dist.plan.demand import MAX_RANKS, smallest_ranks
from smorms3_dist.plan.scripts import Input, ScriptError, specs_of
from smorms3_dist.plan.setup import STATES, TRANSPORTS, Setup
from smorms3_dist.plan.times import SPEEDS

_DTYPES = {f"{kind}{bits}": f"float{bits}" for kind in ("fp", "float") for bits in (16, 32, 64)}

_INPUT_DTYPES = ("float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool")

_MAX_PARAMS = 10**12
_MAX_LAID_OUT = 10**15

_DESCRIPTION = """\
Say what a training will take of each rank, before it is started: memory, bytes that are sent in a
step, and an estimate of the step's time besides the forward and the backward pass; beside that,
what ChainerMN's unsharded optimizer takes. Needs no MPI and no GPU.
"""

_EPILOG = """\
MODEL is a chainer.Link in the file, its class, a function that makes it, or a call of these, such
as 'train.py:MLP(784, 10)'. The file is run, but not as __main__. If sizes of its parameters are
known at the first batch only, as in most models of Chainer's, give --input.

The numbers of memory and bytes are those of the code, for the rank that has most. Not counted are
activations and other temporaries (see --reserve), and what MPI, NCCL and CUDA take for themselves.
Times are rough: bytes by bandwidth, nothing overlapping. Measure your own machine and give them.

defaults of --bandwidth, --node-bandwidth, --memory-bandwidth and --latency:
{speeds}

examples:
  smorms3-dist plan --params 1.5e9 --dtype fp16 --fp32-update --ranks 64 --gpus-per-node 8
  smorms3-dist plan train.py:Net --input 1,1,28,28 --transport host --ranks 4
  smorms3-dist plan 'train.py:MLP(784, 10)' --optimizer adam --memory 80 --reserve 20
"""


def main(arguments: Sequence[str], program: str) -> int:
    """Runs a command line; see `smorms3_dist.cli`.

    The status is 1 if the file has no model to plan for, or ranks do not fit into the given memory.
    """
    parser = make_parser(program)
    options = parser.parse_args(arguments)
    _check(parser, options)
    specs: tuple[ParameterSpec, ...]
    if options.model is None:
        specs = (ParameterSpec("/all", (options.params,), _DTYPES[options.dtype or "fp32"]),)
    else:
        try:
            specs = specs_of(options.model, options.input)
        except ScriptError as error:
            print(f"{program}: error: {error}", file=sys.stderr)
            return 1
    if options.fp32_update and all(spec.dtype != "float16" for spec in specs):
        parser.error("--fp32-update is for float16 parameters, and there are none")
    fields = {field.name for field in dataclasses.fields(Setup)}
    chosen = {name: value for name, value in vars(options).items() if name in fields}
    setup = Setup(specs, **{**chosen, "ranks": options.ranks or 1})
    limit = smallest = None
    if options.limit is not None:
        limit = int(options.limit - options.reserve)
        smallest = smallest_ranks(setup, limit)
        setup = dataclasses.replace(setup, ranks=options.ranks or smallest or MAX_RANKS)
    known = SPEEDS[options.transport]
    given = {name: getattr(options, name) for name in dataclasses.asdict(known)}
    speeds = dataclasses.replace(known, **{k: v for k, v in given.items() if v is not None})
    facts = report.facts(setup, speeds)
    fits = limit is None or facts["memory"]["total"] <= limit
    if limit is not None:
        facts["limit"] = {"bytes": limit, "fits": fits, "smallest_ranks": smallest}
    print(json.dumps(facts, indent=2) if options.json else "\n".join(report.lines(facts)))
    return 0 if fits else 1


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    if (options.params is None) == (options.model is None):
        parser.error("give either FILE.py:MODEL or --params")
    if options.model is not None and options.dtype is not None:
        parser.error("--dtype is for --params; the parameters of a model have their own")
    if options.model is None and options.input:
        parser.error("--input is for FILE.py:MODEL")
    if options.ranks is None and options.limit is None:
        parser.error("give --ranks, or --memory to find the smallest number of them")
    if options.limit is None and options.reserve:
        parser.error("--reserve is a part of --memory, which is missing")
    if options.limit is not None and options.reserve >= options.limit:
        parser.error("--reserve leaves nothing of --memory")
    if options.transport == "host" and (options.params or 0) * (options.ranks or 1) > _MAX_LAID_OUT:
        parser.error("--params times --ranks is more than 1e15, too many to be laid out on CPUs")
    if options.communication_dtype is not None and options.transport not in ("nccl", "host"):
        parser.error("--communication-dtype is for --transport nccl and host")
    if options.gather_dtype is not None and options.transport != "host":
        parser.error("--gather-dtype is for --transport host")
    if options.share_parameters and options.transport != "host":
        parser.error("--share-parameters is for --transport host")


def make_parser(program: str) -> Parser:
    """The parser of its command lines."""
    speeds = "\n".join(
        f"  {name:12} {s.inside / 1e9:g} GB/s, {s.between / 1e9:g} GB/s, {s.memory / 1e9:g} GB/s, "
        f"{s.latency * 1e6:g} us"
        for name, s in SPEEDS.items()
    )
    parser = Parser(
        prog=program,
        description=_DESCRIPTION,
        epilog=_EPILOG.format(speeds=speeds),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("the model").add_argument
    add("model", metavar="FILE.py:MODEL", nargs="?", help="a model in a file")
    add(
        "--input",
        metavar="[DTYPE:]SHAPE",
        action="append",
        default=[],
        type=_input,
        help="an argument of the model, such as 1,1,28,28 or int32:1,20 (repeated for a model with "
        "several): if sizes of its parameters are still unknown, it is called with zeros of these "
        "shapes",
    )
    add("--params", metavar="N", type=_count, help="instead of a model: so many, as in 1.5e9")
    add("--dtype", choices=_DTYPES, help="the dtype of these; by default fp32")
    add = parser.add_argument_group("the training").add_argument
    add("--ranks", "-n", metavar="N", type=_ranks, help="the world size")
    add(
        "--gpus-per-node",
        "--ranks-per-node",
        dest="ranks_per_node",
        metavar="N",
        type=_ranks,
        default=8,
        help="the ranks of a node; by default 8",
    )
    add(
        "--transport",
        choices=TRANSPORTS,
        default="nccl",
        help="how ranks communicate: GPUs over NCCL (the default), over MPI that takes pointers of "
        "GPUs, or through host memory; or CPUs, over MPI",
    )
    add(
        "--optimizer",
        metavar="NAME",
        type=_optimizer,
        default="SMORMS3",
        help=f"by default SMORMS3; also {', '.join(list(STATES)[1:])}",
    )
    add("--fp32-update", action="store_true", help="float16 parameters have fp32 masters")
    add(
        "--gradients",
        choices=("sharded", "replicated"),
        default="sharded",
        help="what a rank receives of the mean gradients: by default its shard",
    )
    add(
        "--hooks",
        action="store_true",
        help="hooks are called, such as GradientNoise and your own; on GPUs all but WeightDecay "
        "are, and dynamic loss scaling counts as one",
    )
    add(
        "--communication-dtype",
        choices=tuple(SENT_AS),
        help="what gradients are sent as over NCCL or from CPUs; by default as they are",
    )
    add(
        "--gather-dtype",
        choices=tuple(SENT_AS),
        help="what parameters are sent as from CPUs; by default as they are",
    )
    add(
        "--double-buffering",
        action="store_true",
        help="each update applies the gradients of the one before",
    )
    add(
        "--share-parameters",
        action="store_true",
        help="the ranks of a node of CPUs share one array of parameters, of which each holds a "
        "part here",
    )
    add = parser.add_argument_group("the machine").add_argument
    add(
        "--memory",
        dest="limit",
        metavar="GIB",
        type=_number(2**30),
        help="the memory of a GPU, or of a rank on CPUs: says how few ranks fit; the exit status "
        "is 1 if --ranks, or any number of them, do not",
    )
    add(
        "--reserve",
        metavar="GIB",
        type=_number(2**30, zero=True),
        default=0.0,
        help="the part of that memory that activations and everything else take",
    )
    for option, name, what in (
        ("--bandwidth", "inside", "what a rank sends to others of its node"),
        ("--node-bandwidth", "between", "what a node sends to others"),
        ("--memory-bandwidth", "memory", "what a rank reads and writes in its memory"),
    ):
        add(option, dest=name, metavar="GB/S", type=_number(1e9), help=what)
    add(
        "--latency",
        metavar="US",
        type=_number(1e-6, zero=True),
        help="microseconds that a message takes more",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with bytes and seconds")
    return parser


def _count(text: str) -> int:
    with contextlib.suppress(decimal.InvalidOperation):
        number = decimal.Decimal(text)
        # In this order: not a number is no number to compare, and others are too large for int().
        if number.is_finite() and 1 <= number <= _MAX_PARAMS and number == int(number):
            return int(number)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1e12")


def _input(text: str) -> Input:
    match = re.fullmatch(r"(?:(\w+):)?([1-9]\d*(?:,[1-9]\d*)*),?", text)
    dtype = None if match is None or match[1] is None else _DTYPES.get(match[1], match[1])
    if match is None or (dtype is not None and dtype not in _INPUT_DTYPES):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the shape of a batch, such as 1,1,28,28, or int32:1,20 with one of "
            f"{', '.join(_INPUT_DTYPES)}"
        )
    return Input(tuple(map(int, match[2].split(","))), dtype)


def _ranks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_RANKS}")
    return int(text)


def _optimizer(text: str) -> str:
    for name in STATES:
        if name.lower() == text.lower():
            return name
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(STATES)}")


def _number(unit: float, zero: bool = False) -> Callable[[str], float]:
    """What reads a number of a unit, which may be zero or not."""
    what = "a number that is not negative" if zero else "a positive number"

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if (value > 0 or (zero and value == 0)) and value < 1e9:
                return value * unit
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} below 1e9")

    return number
