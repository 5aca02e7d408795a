"""Tables of the results of `cpu_step.py`, and what was expected of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.report import MIB, RESET, Expectation, conditions, table, versions

OURS = "smorms3_dist"

TITLES = {
    OURS: "smorms3_dist, SMORMS3",
    "chainermn": "ChainerMN naive, Chainer's SMORMS3",
    f"{OURS}_hooks": "smorms3_dist, SMORMS3, weight decay and clipping",
    "chainermn_hooks": "ChainerMN naive, the same",
    f"{OURS}_adam": "smorms3_dist, Chainer's Adam",
    "chainermn_adam": "ChainerMN naive, the same",
    "ddp_zero": "PyTorch DDP + ZeroRedundancyOptimizer, Adam (2 states)",
    "ddp_zero_amsgrad": "the same, AMSGrad (3 states, as SMORMS3)",
}


def progress(run: Mapping[str, Any]) -> str:
    """One line about a run, for somebody who waits."""
    return (
        f"round {run['round'] + 1}: {run['size']}M {run['peer']}: {1e3 * run['step_s']:.1f} ms, "
        f"{run['step_s'] / run['memcpy_s']:.2f} x memcpy, "
        f"{max(run['peak_over_base_bytes']) / MIB:.0f} MiB over base; "
        f"others used {run['cores_used_by_others']} cores"
    )


class Summary(NamedTuple):
    """Medians over the rounds of one peer at one size; the largest of the ranks for memory.

    Attributes:
        step_ms: Optimizer and communication of a step.
        memcpy_ms: Memcpy of the gradients.
        ratio: The median of the rounds' own ratios of the two.
        peak_mib: Peak memory over base.
        state_bytes: Bytes of state a parameter, on the rank that has the most of them.
        all_state_bytes: Bytes of state a parameter over all ranks.
    """

    step_ms: float
    memcpy_ms: float
    ratio: float
    peak_mib: float
    state_bytes: float
    all_state_bytes: float


def summarize(runs: Sequence[Mapping[str, Any]]) -> Summary:
    """Condenses the runs of one peer at one size."""

    def median(value: Callable[[Mapping[str, Any]], float]) -> float:
        return statistics.median(map(value, runs))

    return Summary(
        median(lambda run: 1e3 * run["step_s"]),
        median(lambda run: 1e3 * run["memcpy_s"]),
        median(lambda run: run["step_s"] / run["memcpy_s"]),
        median(lambda run: max(run["peak_over_base_bytes"]) / MIB),
        median(lambda run: max(run["state_bytes"]) / run["parameters"]),
        median(lambda run: sum(run["state_bytes"]) / run["parameters"]),
    )


def expectations(
    summaries: Mapping[tuple[str, str], Summary], kernel_ratio: float | None, ranks: int
) -> Iterator[Expectation]:
    """What is expected at 59M parameters and 2 ranks, and of the kernel."""
    ours = summaries.get(("59", OURS))
    if ours is not None and ranks == 2:
        yield Expectation("step / memcpy of the gradients", ours.ratio, False, 3.3)
        for peer, speed in ("chainermn", 8), ("ddp_zero", 3):
            if ("59", peer) in summaries:
                theirs = summaries["59", peer]
                yield Expectation(
                    f"step of {peer} / ours", theirs.step_ms / ours.step_ms, True, speed
                )
        for peer in ("ddp_zero", "ddp_zero_amsgrad"):
            if ("59", peer) in summaries:
                theirs = summaries["59", peer]
                yield Expectation(
                    f"peak over base / that of {peer}", ours.peak_mib / theirs.peak_mib, False, 0.6
                )
        yield Expectation("bytes of state a parameter, largest rank", ours.state_bytes, False, 6)
    if kernel_ratio is not None:
        yield Expectation("kernel / loop in C", kernel_ratio, False, 1.1)


def markdown(result: Mapping[str, Any]) -> str:
    """The whole report."""
    runs = result["runs"]
    keys = dict.fromkeys((run["size"], run["peer"]) for run in runs)
    summaries = {
        key: summarize([run for run in runs if (run["size"], run["peer"]) == key]) for key in keys
    }
    rows = []
    for (size, peer), summary in summaries.items():
        ours = summaries.get((size, OURS))
        rows.append(
            (
                f"{size}M",
                TITLES[peer],
                f"{summary.step_ms:.1f}",
                f"{summary.memcpy_ms:.1f}",
                f"{summary.ratio:.2f}",
                f"{summary.step_ms / ours.step_ms:.2f}" if ours else "",
                f"{summary.state_bytes:.3f}",
                f"{summary.all_state_bytes:.3f}",
                f"{summary.peak_mib:.0f}",
            )
        )
    header = (
        *("size", "system", "step, ms", "memcpy, ms", "step / memcpy", "step / ours"),
        *("state, bytes a parameter: largest rank", "all ranks", "peak over base, MiB a rank"),
    )
    kernels = [run for run in result["kernel"] if "skipped" not in run]
    kernel_ratio = None
    if kernels:
        kernel_ratio = statistics.median(run["kernel_s"] / run["c_s"] for run in kernels)
        ours_ns, c_ns = (
            statistics.median(1e9 * run[key] / run["elements"] for run in kernels)
            for key in ("kernel_s", "c_s")
        )
        kernel_line = (
            f"The kernel, 1 process: {ours_ns:.2f} ns an element; a loop in C: {c_ns:.2f}."
        )
    else:
        kernel_line = f"The kernel was not compared: {result['kernel'][0]['skipped']}."
    expected = [item.row() for item in expectations(summaries, kernel_ratio, result["ranks"])]
    return "\n".join(
        [
            f"# Optimizer and communication of a step on CPUs, {result['ranks']} ranks",
            "",
            *_conditions(result),
            "",
            *table(header, rows),
            "",
            kernel_line,
            "",
            *_rules(kernels),
            *table(("expected at 59M, 2 ranks", "measured", "bound", ""), expected),
        ]
    )


def _rules(kernels: Sequence[Mapping[str, Any]]) -> list[str]:
    """The compiled updates of all rules, 1 process."""
    kernels = [run for run in kernels if "rules" in run]
    if not kernels:
        return []

    def median(value: Callable[[Mapping[str, Any]], float]) -> str:
        return f"{statistics.median(map(value, kernels)):.2f}"

    def a_byte(rule: Mapping[str, float]) -> float:
        return rule["s"] / rule["bytes"]

    def row(name: str) -> tuple[str, str, str, str]:
        return (
            name,
            f"{kernels[0]['rules'][name]['bytes']:.0f}",
            median(lambda run: 1e9 * run["rules"][name]["s"] / run["elements"]),
            median(lambda run: a_byte(run["rules"][name]) / a_byte(run["rules"]["SMORMS3"])),
        )

    rows = [row(name) for name in kernels[0]["rules"]]
    header = ("rule", "bytes an element", "ns an element", "time a byte / SMORMS3's")
    return [*table(header, rows), ""]


def _conditions(result: Mapping[str, Any]) -> Iterator[str]:
    runs = result["runs"]
    yield from conditions(result, runs)
    yield f"- {result['rounds']} rounds of {result['steps']} steps; 1 thread a rank"
    kernel = (("kernel", run) for run in result["kernel"])
    yield from versions([*((run["peer"], run) for run in runs), *kernel])
    if not all(run["peak_was_reset"] for run in runs):
        yield RESET
