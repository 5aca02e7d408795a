"""What a plan says: facts for JSON, and tables made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from smorms3_dist.plan.memory import (
    MAX_RANKS,
    chainermn_memory,
    chainermn_sent,
    memory,
    most_sent,
)
from smorms3_dist.plan.setup import Setup
from smorms3_dist.plan.times import Speeds, chainermn_times, times

_GIB = 2**30

_MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "mean_gradients": "mean gradients",
    "buffers": "buckets, buffers",
    "masters": "fp32 masters",
    "states": "states",
    "total": "total",
}

_SENT = {
    "reduce_scatter": "reduce-scatter",
    "gather_gradients": "all-gather, gradients",
    "all_gather": "all-gather",
    "all_reduce": "all-reduce",
    "total": "total",
}

_TIMES = {
    "pack": "packing",
    "reduce": "reduction",
    "gather_gradients": "all-gather, gradients",
    "update": "update",
    "all_gather": "all-gather",
    "total": "total",
}


def facts(setup: Setup, speeds: Speeds, ranks_per_node: int) -> dict[str, Any]:
    """All that is known, in bytes, seconds and bytes a second.

    Args:
        setup: The model and how it is trained.
        speeds: The machine.
        ranks_per_node: Ranks of a node.
    """
    sent, reduced = most_sent(setup), chainermn_sent(setup)
    return {
        "parameters": {group.dtype.name: group.elements for group in setup.groups},
        "training": {
            "ranks": setup.ranks,
            "ranks_per_node": ranks_per_node,
            "transport": setup.transport,
            "optimizer": setup.optimizer,
            "fp32_update": setup.fp32_update,
            "gradients": "replicated" if setup.replicated else "sharded",
            "hooks": setup.hooks,
            "communication_dtype": setup.communication_dtype,
        },
        "speeds": dataclasses.asdict(speeds),
        "memory": _of(memory(setup)),
        "sent": _of(sent),
        "seconds": _of(times(setup, speeds, ranks_per_node)),
        "chainermn": {
            "memory": _of(chainermn_memory(setup)),
            "sent": {"all_reduce": reduced, "total": reduced},
            "seconds": _of(chainermn_times(setup, speeds, ranks_per_node)),
        },
    }


def _of(numbers: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(numbers), "total": numbers.total}


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts for a reader: memory in GiB, bytes in GB, times in milliseconds."""
    training, theirs = facts["training"], facts["chainermn"]
    counts = ", ".join(f"{count:,} {dtype}" for dtype, count in facts["parameters"].items())
    nodes = -(-training["ranks"] // training["ranks_per_node"])
    details = [
        training["optimizer"],
        _several(training["ranks"], "rank"),
        _several(nodes, "node"),
        f"transport {training['transport']}",
        f"{training['gradients']} gradients",
    ]
    if training["fp32_update"]:
        details.append("fp32 masters")
    if training["communication_dtype"] is not None:
        details.append(f"gradients sent as {training['communication_dtype']}")
    yield f"{counts} parameters: {', '.join(details)}"
    where = "a rank" if training["transport"] == "host" else "a GPU"
    yield from _table(f"memory of {where}, GiB", _MEMORY, facts["memory"], theirs["memory"], _GIB)
    beside = facts["memory"]["host_buffers"]
    if beside:
        yield f"and {beside / _GIB:.3f} GiB of host memory a rank"
    yield from _table("sent by a rank in a step, GB", _SENT, facts["sent"], theirs["sent"], 1e9)
    yield from _table("time of a step, ms", _TIMES, facts["seconds"], theirs["seconds"], 1e-3)
    speeds = facts["speeds"]
    yield (
        f"  at {speeds['inside'] / 1e9:g} GB/s a rank in a node, {speeds['between'] / 1e9:g} GB/s "
        f"a node, {speeds['memory'] / 1e9:g} GB/s of memory, {speeds['latency'] * 1e6:g} us a "
        "message"
    )
    if "limit" in facts:
        yield ""
        yield _limit(facts["limit"], training["ranks"], theirs["memory"]["total"])


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _table(
    title: str, rows: dict[str, str], ours: dict[str, Any], theirs: dict[str, Any], unit: float
) -> Iterator[str]:
    yield ""
    yield f"{title:30} {'smorms3_dist':>14} {'ChainerMN':>14}"
    for key, name in rows.items():
        if key == "total" or ours.get(key) or theirs.get(key):
            cells = (_number(table.get(key), unit) for table in (ours, theirs))
            yield f"  {name:28} " + " ".join(f"{cell:>14}" for cell in cells)


def _number(value: float | None, unit: float) -> str:
    return f"{value / unit:,.3f}" if value else "-"


def _limit(limit: dict[str, Any], ranks: int, chainermn: int) -> str:
    size = f"{limit['bytes'] / _GIB:g} GiB"
    smallest = limit["smallest_ranks"]
    if smallest is None:
        ours = (
            f"No number of ranks up to {MAX_RANKS:,} fits into {size} each: parameters and "
            "gradients are whole on all"
        )
    else:
        verb = "fits" if ranks == 1 else "fit"
        fit = verb if limit["fits"] else f"do{'es' if ranks == 1 else ''} not fit"
        ours = f"{_several(ranks, 'rank')} {fit} into {size}; the fewest that do are {smallest:,}"
    theirs = "would fit, too" if chainermn <= limit["bytes"] else "would not, however many"
    return f"{ours}. ChainerMN's {theirs}."
