"""What a plan says: facts for JSON, and tables made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from smorms3_dist.plan.demand import MAX_RANKS, chainermn_memory, chainermn_sent, memory, sent
from smorms3_dist.plan.setup import Setup, elements
from smorms3_dist.plan.times import Speeds, chainermn_times, times

_GIB = 2**30

_UNITS = {
    "memory": {"TiB": 2.0**40, "GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "B": 1.0},
    "sent": {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0},
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
}
"""The units of tables, the largest first."""

_FASTER, _LESS = 0.97, 0.99
"""The parts of ChainerMN's time and memory that count as a gain."""

_ROWS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "mean_gradients": "mean gradients",
    "in_flight": "gradients in flight",
    "buffers": "buckets, buffers",
    "masters": "fp32 masters",
    "states": "states",
    "pack": "packing",
    "reduce": "reduction",
    "reduce_scatter": "reduce-scatter",
    "gather_gradients": "all-gather, gradients",
    "update": "update",
    "all_gather": "all-gather",
    "all_reduce": "all-reduce",
    "total": "total",
}
"""The names of all tables' rows for a reader, in their order."""


def facts(setup: Setup, speeds: Speeds) -> dict[str, Any]:
    """All that is known of a training on a machine, in bytes, seconds and bytes a second."""
    parts = {field.name: getattr(setup, field.name) for field in dataclasses.fields(setup)}
    del parts["specs"]
    return {
        "parameters": {group.dtype.name: elements(group) for group in setup.groups},
        "training": parts,
        "speeds": dataclasses.asdict(speeds),
        "memory": memory(setup),
        "sent": sent(setup),
        "seconds": times(setup, speeds),
        "chainermn": {
            "memory": chainermn_memory(setup),
            "sent": chainermn_sent(setup),
            "seconds": chainermn_times(setup, speeds),
        },
    }


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts for a reader, each table in the largest unit of which its total has one."""
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
    if training["double_buffering"]:
        details.append("double buffering")
    if training["communication_dtype"] is not None:
        details.append(f"gradients sent as {training['communication_dtype']}")
    if training["gather_dtype"] is not None:
        details.append(f"parameters sent as {training['gather_dtype']}")
    if training["share_parameters"]:
        details.append("parameters shared by the ranks of a node")
    yield f"{counts} parameters: {', '.join(details)}"
    owner = "a rank" if training["transport"] == "host" else "a GPU"
    yield from _table(f"memory of {owner}", "memory", facts)
    beside = facts["memory"]["host_buffers"]
    if beside:
        unit = _unit("memory", beside)
        yield f"and {beside / _UNITS['memory'][unit]:.3f} {unit} of host memory a rank"
    yield from _table("sent by a rank in a step", "sent", facts)
    yield from _table("time of a step", "seconds", facts)
    speeds = facts["speeds"]
    yield (
        f"  at {speeds['inside'] / 1e9:g} GB/s a rank in a node, {speeds['between'] / 1e9:g} GB/s "
        f"a node, {speeds['memory'] / 1e9:g} GB/s of memory, {speeds['latency'] * 1e6:g} us a "
        "message"
    )
    yield from _gain(facts)
    if "limit" in facts:
        yield ""
        yield _limit(facts["limit"], training["ranks"], theirs["memory"]["total"])


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _unit(key: str, value: float) -> str:
    """The largest unit of which there is one, or the smallest."""
    units = _UNITS[key]
    return next((name for name, size in units.items() if value >= size), [*units][-1])


def _gain(facts: dict[str, Any]) -> Iterator[str]:
    """Says where the step is not the gain."""
    theirs = facts["chainermn"]
    if facts["seconds"]["total"] <= _FASTER * theirs["seconds"]["total"]:
        return
    ours, whole = facts["memory"]["total"], theirs["memory"]["total"]
    yield ""
    if ours <= _LESS * whole:
        yield f"The step is not faster here: memory is the gain, {1 - ours / whole:.0%} less of it."
    else:
        yield "Neither memory nor time is gained here."


def _table(title: str, key: str, facts: dict[str, Any]) -> Iterator[str]:
    tables = facts[key], facts["chainermn"][key]
    name = _unit(key, min(table["total"] for table in tables) or tables[1]["total"])
    unit = _UNITS[key][name]
    title = f"{title}, {name}"
    yield ""
    yield f"{title:30} {'smorms3_dist':>14} {'ChainerMN':>14}"
    for row, name in _ROWS.items():
        values = [table.get(row) for table in tables]
        if row == "total" or any(values):
            cells = (f"{value / unit:,.3f}" if value else "-" for value in values)
            yield f"  {name:28} " + " ".join(f"{cell:>14}" for cell in cells)


def _limit(limit: dict[str, Any], ranks: int, chainermn: int) -> str:
    size = f"{limit['bytes'] / _GIB:g} GiB"
    smallest = limit["smallest_ranks"]
    if smallest is None:
        ours = (
            f"No number of ranks up to {MAX_RANKS:,} fits into {size} each: gradients are whole on "
            "all, and parameters on every rank or node"
        )
    else:
        verb = "fits" if ranks == 1 else "fit"
        fit = verb if limit["fits"] else f"do{'es' if ranks == 1 else ''} not fit"
        ours = f"{_several(ranks, 'rank')} {fit} into {size}; the fewest that do are {smallest:,}"
    theirs = "would fit, too" if chainermn <= limit["bytes"] else "would not, however many"
    return f"{ours}. ChainerMN's {theirs}."
