"""What a recorded step would take on more ranks: the formulas of ``smorms3-dist plan``, calibrated.

Forward and backward pass take every rank what they took when they were recorded, with a batch of
its own. The update of a shard takes what that of the whole model took one rank, divided by the
ranks, and as much longer as a memcpy that so many ranks of a host make at once takes longer: so
ranks that share cores share them here, too. What a rank receives of its shard is read once more, to
be summed up, and between two terms so is the sum read and written: bytes of a memcpy. What ranks of
a host send each other takes what the bare exchange of two has taken, and messages what half a word
takes, longer by the same factor. Between hosts, messages have the latency and bytes the bandwidth
that are given, of which TCP's headers take their part. While pieces of gradients are under way, the
processor does its part of TCP, as long as two ranks that exchange bytes over TCP without a limit
have taken, and updates the pieces before them: so of the wire and the processor only the longer
time counts. Parameters are gathered afterwards; each enters a host once, and is handed on there
meanwhile. What is left is the work of Python, which a step of one element shows, and the word that
all ranks agree by, which takes a turn for each doubling of ranks.

So this is a model of the sharded step. `checks` holds it against what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smorms3_dist.bench import gpu_simulation
from smorms3_dist.bench.summary import OURS, OVER_LINK, OVER_TCP, Row, in_words, rows, table
from smorms3_dist.layout import ParameterSpec
from smorms3_dist.plan.setup import Setup
from smorms3_dist.plan.times import SPEEDS, Speeds, times, update_bytes

MOST_RANKS = 4096

LATENCY = 50e-6
"""Seconds that a message between hosts takes to start, where nothing else is given."""

PAYLOAD = 1448 / 1514
"""Of the bytes of an Ethernet frame, those that are not headers."""

BANDWIDTH = 10e9
"""Bits a second that a host sends, where nothing else is given."""

GPUS_PER_HOST = 8

_GPUS = SPEEDS["nccl"]

ALLOWED = 0.15
"""How far a model may be from what was measured."""


class NotRecorded(Exception):
    """The file lacks something that a model needs; the message names it."""


class Link(NamedTuple):
    """What is between hosts.

    Attributes:
        ranks_per_host: How many ranks a host has.
        latency: Seconds that a message takes to start.
        bandwidth: Bytes a second that a host sends.
    """

    ranks_per_host: int
    latency: float
    bandwidth: float


class _Exchange:
    """What two ranks exchange, measured: seconds of a ``word``, bytes a second of parts.

    Args:
        row: The result of `smorms3_dist.bench.rank_exchanges`.
    """

    def __init__(self, row: Row) -> None:
        sent = row.rest["bytes"] / 2
        self.word = row.seconds["word"].median
        self.reduce = sent / row.seconds["exchange"].median
        self.gather = sent / row.seconds["gather"].median
        self.both = 2 * sent / (row.seconds["exchange"].median + row.seconds["gather"].median)


class Foretold(NamedTuple):
    """A step, in seconds.

    Attributes:
        compute: Forward and backward pass.
        agree: Python, and the word that ranks agree by.
        reduce: Gradients to their owners, and the update.
        gather: Parameters to all.
    """

    compute: float
    agree: float
    reduce: float
    gather: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self)


class Recording:
    """A result of `smorms3_dist.bench.suite.run`, as a model needs it.

    Args:
        result: The result.

    Attributes:
        cores: Of the host.
        steps: Seconds of the measured steps of a perceptron, by the number of ranks.
        parameters: How many parameters that has.
        models: Seconds of forward and backward pass, and parameters, of whole steps by model.

    Raises:
        NotRecorded: If a part was left out that is needed.
    """

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.cores = result["machine"]["cores"]
        of_ranks = [row for row in rows(result, "ranks") if row.system == OURS]
        for row in rows(result, "step"):
            if row.system == OURS and row.name == "19M":
                of_ranks.append(row)
        self.steps = {row.ranks: row.step for row in of_ranks}
        self._memcpys = {row.ranks: row.seconds["memcpy"].median for row in of_ranks}
        if not {1, 2} <= self.steps.keys():
            raise NotRecorded(
                "the file has no steps of 1 and 2 ranks: measure the parts ranks and step"
            )
        self.parameters = of_ranks[0].rest["parameters"]
        exchanges = list(rows(result, "exchange"))
        over_tcp = [row for row in exchanges if row.name.endswith(OVER_TCP)]
        # Bytes a second by the rate of the link.
        self._over_links = {
            float(row.name.rpartition(OVER_LINK)[2]): _Exchange(row).both
            for row in exchanges
            if OVER_LINK in row.name
        }
        within = [r for r in exchanges if r not in over_tcp and OVER_LINK not in r.name]
        self._exchange = _Exchange(_only(within, "exchange"))
        # Results that are older do not have it.
        self._tcp = _Exchange(over_tcp[0]) if over_tcp else None
        self._smallest = _only(
            [r for r in rows(result, "checks") if r.name == "one element"], "checks"
        )
        self._links = [row for row in rows(result, "links") if row.system == OURS]
        self.models = {
            row.name: (
                row.seconds["forward"].median + row.seconds["backward"].median,
                row.rest["parameters"],
            )
            for row in rows(result, "whole")
            if row.system == OURS
        }

    def contention(self, ranks: int) -> float:
        """How much slower memory is when so many ranks of the host use it at once."""
        known = max(n for n in self._memcpys if n <= ranks)
        return self._memcpys[known] / self._memcpys[1] * (ranks / known)

    def foretell(
        self,
        ranks: int,
        parameters: int,
        compute: float = 0.0,
        link: Link | None = None,
        beside: int | None = None,
    ) -> Foretold:
        """A step of so many ranks.

        Args:
            ranks: The world size.
            parameters: Of the model, in float32, updated by SMORMS3.
            compute: Seconds of forward and backward pass.
            link: What is between hosts; ``None`` if all ranks are on one.
            beside: How many ranks use the cores and the memory of a machine; ``None`` if those of a
                host do.
        """
        here = ranks if link is None else min(link.ranks_per_host, ranks)
        setup = Setup(
            (ParameterSpec("/all", (parameters,), "float32"),), ranks, here, transport="host"
        )
        slower = self.contention(beside or here)
        an_element = (self.steps[1] - self._python()) / self.parameters
        memory = update_bytes(setup, setup.groups[0]) / an_element / slower
        summed = self._summing(ranks, parameters) * slower
        slower /= self.contention(2)
        word = self._exchange.word
        turns = math.ceil(math.log2(ranks))
        reduce, gather = self._exchange.reduce / slower, self._exchange.gather / slower
        # What all ranks of a host send others by TCP, if nothing but processors is in the way.
        reduce_over_tcp = gather_over_tcp = math.inf
        if link is None:
            latency, between, hops = word / 2, math.inf, 0
        else:
            latency, between = link.latency, link.bandwidth * PAYLOAD
            hops = math.ceil(math.log2(math.ceil(ranks / here)))
            if self._tcp is not None:
                reduce_over_tcp = self._tcp.reduce / slower * here
                gather_over_tcp = self._tcp.gather / slower * here

        def parts(inside: float, between: float, latency: float) -> dict[str, float]:
            return times(setup, Speeds(inside, between, memory, latency))

        local = parts(reduce, reduce_over_tcp, word / 2 * max(slower, 1.0))
        wire = parts(math.inf, between, latency)
        gathered = parts(gather, min(between, gather_over_tcp), latency)
        agree = self._python() + (turns - hops) * word + 2 * hops * latency
        reduced = max(local["reduce"] + summed + local["update"], wire["reduce"])
        return Foretold(compute, agree, reduced, gathered["all_gather"] if ranks > 1 else 0.0)

    def _summing(self, ranks: int, parameters: int) -> float:
        """What it takes to sum up the gradients of a shard, in float32, beside its update."""
        read, between_terms = ranks - 1, max(ranks - 2, 0)
        nbytes = parameters / ranks * 4 * (read + 2 * between_terms)
        a_byte = self._memcpys[1] / (2 * 4 * self.parameters)
        return nbytes * a_byte

    def _python(self) -> float:
        """What a step takes besides bytes and the word."""
        return max(self._smallest.step - self._exchange.word, 0.0)

    def checks(self) -> Iterator[tuple[int, float, float]]:
        """Ranks of the host, the measured step, and what the model says."""
        for ranks, measured in sorted(self.steps.items()):
            yield ranks, measured, self.foretell(ranks, self.parameters).total

    def checks_of_links(self) -> Iterator[tuple[float, float, float]]:
        """Gbit/s between two hosts with a rank each, the measured step, and what the model says.

        The model is given the bandwidth that a bare exchange has over the link, if it is known.
        """
        for row in self._links:
            rate, _, rest = row.name.partition(" Gbit/s")
            if not rest:
                nominal = float(rate) * 1e9 / 8
                bare = self._over_links.get(float(rate))
                link = Link(1, LATENCY, nominal if bare is None else bare / PAYLOAD)
                # Hosts of this machine.
                modelled = self.foretell(2, row.rest["parameters"], 0.0, link, beside=2).total
                yield float(rate), row.step, modelled


def _only(found: Sequence[Row], part: str) -> Row:
    if not found:
        raise NotRecorded(f"the file lacks the part {part!r}: measure it, too")
    return found[0]


def world_sizes(most: int) -> list[int]:
    """Powers of two up to the largest world, and that one."""
    return [*(1 << n for n in range(most.bit_length()) if 1 << n < most), most]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the model."""
    add = parser.add_argument_group("a model of more ranks, from a recorded run").add_argument
    add("--simulate", type=_ranks, metavar="N", help="foretell whole steps of up to N ranks")
    add("--recorded", type=Path, metavar="FILE", help="what --output has written")
    add("--gpus", action="store_true", help="on GPUs instead, by assumed speeds: no FILE")
    told = "by default 2, and 8 GPUs"
    add("--ranks-per-host", type=_ranks, metavar="N", help=told)
    told = f"of a message; by default {LATENCY * 1e6:g}, and {_GPUS.latency * 1e6:g} with GPUs"
    add("--latency", type=_positive, metavar="US", help=told)
    told = f"of a host; by default {BANDWIDTH / 1e9:g}, and {_GPUS.between * 8 / 1e9:g} with GPUs"
    add("--bandwidth", type=_positive, metavar="GBIT/S", help=told)


def told(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the command: tables of the models, and how far they are to be trusted.

    Raises:
        NotRecorded: If there is no file, or it lacks something.
    """
    if options.gpus:
        sizes = [ranks for ranks in world_sizes(options.simulate) if ranks > 1]
        here = options.ranks_per_host or GPUS_PER_HOST
        yield from gpu_simulation.told(sizes, here, _speeds_of_gpus(options))
        return
    if options.recorded is None:
        raise NotRecorded("--simulate needs --recorded FILE, which bench --output FILE makes")
    recording = Recording(json.loads(options.recorded.read_text()))
    latency = options.latency or LATENCY * 1e6
    bandwidth = options.bandwidth or BANDWIDTH / 1e9
    link = Link(options.ranks_per_host or 2, latency * 1e-6, bandwidth * 1e9 / 8)
    yield (
        f"A model, not a measurement: {link.ranks_per_host} ranks a host, "
        f"{latency:g} us and {bandwidth:g} Gbit/s between hosts."
    )
    for model, (compute, parameters) in recording.models.items():
        yield ""
        yield f"{model}, {parameters / 1e6:.1f}M parameters, each rank with a batch of its own:"
        yield ""
        lines = []
        for ranks in world_sizes(options.simulate):
            step = recording.foretell(ranks, parameters, compute, link)
            of_step = f"{step.compute / step.total:.0%}"
            lines.append((str(ranks), *map(in_words, (*step, step.total)), of_step))
        yield from table(
            ("ranks", "compute", "agree", "reduce and update", "gather", "step", "computing"), lines
        )
    yield ""
    yield from checked(recording)


def _speeds_of_gpus(options: argparse.Namespace) -> Speeds:
    given = {}
    if options.latency is not None:
        given["latency"] = options.latency * 1e-6
    if options.bandwidth is not None:
        given["between"] = options.bandwidth * 1e9 / 8
    return dataclasses.replace(_GPUS, **given)


def checked(recording: Recording) -> Iterator[str]:
    """The model beside what was measured on one host, as a table."""
    found: list[tuple[str, str, float, float]] = []
    for ranks, measured, model in recording.checks():
        where = "a core each" if ranks <= recording.cores else "cores shared"
        # Of one rank the model has its update.
        found.append((str(ranks), "calibrates it" if ranks == 1 else where, measured, model))
    for rate, measured, model in recording.checks_of_links():
        found.append(("2", f"two hosts, {rate:g} Gbit/s", measured, model))
    lines = []
    for count, where, measured, model in found:
        off = model / measured - 1
        beyond = "" if abs(off) <= ALLOWED else f", more than {ALLOWED:.0%} off"
        lines.append((count, where, in_words(measured), in_words(model), f"{off:+.0%}{beyond}"))
    size = f"{recording.parameters / 1e6:.0f}M parameters"
    yield f"The model beside measured steps of {size}:"
    yield ""
    yield from table(("ranks", "", "measured", "model", ""), lines)


def _ranks(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {MOST_RANKS}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
