"""What a step would take on GPUs beside its forward and backward pass: a model, from given speeds.

The speeds are assumed, not measured, and the formulas those of ``smorms3-dist plan``. In addition
this model knows the order of a step over NCCL: on one stream a bucket is packed while, on another,
the one before it is reduced, and updated as soon as it is; what has been updated is gathered at the
end. With ``overlap=True`` all buckets but the last have been reduced when the backward pass ends,
and are updated while that one is; with double buffering gradients are reduced beside the next
forward and backward pass. Passes are taken to be long enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from smorms3_dist.bench.summary import in_words, table
from smorms3_dist.layout import ParameterSpec, early_gpu_bucket_bytes
from smorms3_dist.plan.setup import Setup
from smorms3_dist.plan.times import Speeds, chainermn_times, times

SIZES = (25_600_000, 340_000_000, 1_500_000_000)
"""Parameters of the models: as many as a ResNet-50, a large BERT and a large GPT-2 have."""


class GpuStep(NamedTuple):
    """Seconds of a step beside its forward and backward pass.

    Attributes:
        chainermn: Of ChainerMN with Chainer's optimizer.
        in_turn: With nothing at the same time.
        overlapped: As it is done.
        in_backward: With ``overlap=True``.
        double_buffered: With double buffering.
    """

    chainermn: float
    in_turn: float
    overlapped: float
    in_backward: float
    double_buffered: float

    @property
    def gain(self) -> float:
        """What is gained on ChainerMN, as a part of its time."""
        return 1 - self.overlapped / self.chainermn


def foretell(parameters: int, ranks: int, ranks_per_node: int, speeds: Speeds) -> GpuStep:
    """A step of SMORMS3 in float32.

    Args:
        parameters: Of the model.
        ranks: The world size: a GPU each.
        ranks_per_node: GPUs of a host.
        speeds: Of the machine.
    """
    specs = (ParameterSpec("/all", (parameters,), "float32"),)
    setup = Setup(specs, ranks, ranks_per_node, transport="nccl")
    parts = times(setup, speeds)
    count = len(setup.groups[0].buckets)
    each = {name: parts[name] / count for name in ("pack", "reduce", "update")}
    overlapped = pipelined(each["pack"], each["reduce"], each["update"], count)
    beside = parts["pack"] + parts["update"] + parts["all_gather"]
    return GpuStep(
        chainermn_times(setup, speeds)["total"],
        parts["total"],
        overlapped + parts["all_gather"],
        _reduced_in_backward(parameters, ranks, ranks_per_node, speeds),
        min(beside, overlapped + parts["all_gather"]),
    )


def _reduced_in_backward(parameters: int, ranks: int, ranks_per_node: int, speeds: Speeds) -> float:
    """Seconds of equal buckets of which the backward pass leaves the last one to be reduced."""
    count = -(-4 * parameters // early_gpu_bucket_bytes(ranks))
    specs = (ParameterSpec("/last", (-(-parameters // count),), "float32"),)
    last = times(Setup(specs, ranks, ranks_per_node, transport="nccl"), speeds)
    others = max((count - 1) * last["update"], last["pack"] + last["reduce"])
    return others + last["update"] + count * last["all_gather"]


def pipelined(pack: float, reduce: float, update: float, count: int) -> float:
    """Seconds of equal buckets, as `smorms3_dist.collectives.nccl` gives them to two streams."""
    computing = reducing = 0.0
    reduced: list[float] = []
    for index in range(count):
        computing += pack
        reducing = max(reducing, computing) + reduce
        reduced.append(reducing)
        if index > 0:
            computing = max(computing, reduced[index - 1]) + update
    return max(computing, reduced[-1]) + update if reduced else 0.0


def told(ranks: list[int], ranks_per_node: int, speeds: Speeds) -> Iterator[str]:
    """The lines of the command: a table for each size of a model."""
    yield (
        f"A model, not a measurement: {ranks_per_node} GPUs a host, "
        f"{speeds.inside / 1e9:g} GB/s a GPU within it, {speeds.between / 1e9:g} GB/s a host, "
        f"{speeds.memory / 1e9:g} GB/s of memory, {speeds.latency * 1e6:g} us a message."
    )
    for parameters in SIZES:
        yield ""
        yield f"{parameters / 1e6:.1f}M parameters, a step without forward and backward pass:"
        yield ""
        lines = []
        for count in ranks:
            step = foretell(parameters, count, ranks_per_node, speeds)
            lines.append((str(count), *map(in_words, step), f"{step.gain:.0%}"))
        columns = (
            *("ranks", "ChainerMN", "in turn", "overlapped", "overlap=True", "double buffering"),
            "gain",
        )
        yield from table(columns, lines)
