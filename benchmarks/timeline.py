"""``python -m benchmarks.timeline FILE PICTURE --steps FIRST LAST``: draws steps of a timeline.

FILE is what ``smorms3-dist timeline`` has written. Each rank has a line for its training, in the
colours of the phases, and below it a thinner one for what goes on beside.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

COLOURS = {
    "compute": "#bbbbbb",
    "agree": "#f0e442",
    "layout": "#cc79a7",
    "reduce": "#56b4e9",
    "hooks": "#e69f00",
    "update": "#0072b2",
    "gather": "#009e73",
    "checkpoint": "#d55e00",
    "checkpoint copy": "#8c3d00",
    "checkpoint write": "#a6761d",
    "checkpoint commit": "#444444",
    "checkpoint retain": "#888888",
}
TRAINING, BESIDE = 0, 1
HEIGHTS = {TRAINING: (0.15, 0.5), BESIDE: (-0.2, 0.22)}
"""Where a track is within the place of its rank, and how high."""


def draw(timeline: dict[str, Any], picture: Path, first: int, last: int) -> None:
    """Draws what happened between the first rank's begin of a step and the last's end of another.

    Args:
        timeline: The merged timeline.
        picture: The file to write.
        first: The number of the first step.
        last: That of the last.
    """
    events, ranks = timeline["traceEvents"], timeline["otherData"]["ranks"]
    spans = [event for event in events if event["ph"] == "X"]
    begin = min(span["ts"] for span in spans if span["name"] == f"step {first}")
    end = max(span["ts"] + span["dur"] for span in spans if span["name"] == f"step {last}")
    matplotlib.use("agg")
    matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(9, 1.3 + 0.75 * len(ranks)), layout="constrained")
    drawn = set()
    for span in spans:
        start, stop = max(span["ts"], begin), min(span["ts"] + span["dur"], end)
        if start >= stop or span["cat"] == "step":
            if span["cat"] == "step" and begin <= span["ts"] + span["dur"] <= end:
                at, where = (span["ts"] + span["dur"] - begin) / 1e3, -ranks.index(span["pid"])
                axes.vlines(at, where + 0.1, where + 0.7, color="black", linewidth=1)
            continue
        low, high = HEIGHTS[span["tid"]]
        axes.broken_barh(
            [((start - begin) / 1e3, (stop - start) / 1e3)],
            (low - ranks.index(span["pid"]), high),
            color=COLOURS[span["name"]],
            linewidth=0,
        )
        drawn.add(span["name"])
    for name in filter(drawn.__contains__, COLOURS):
        axes.broken_barh([], (0, 0), color=COLOURS[name], label=name)
    axes.set_xlim(0, (end - begin) / 1e3)
    axes.set_ylim(-len(ranks) + 0.7, 0.8)
    axes.set_yticks([-index + 0.2 for index in range(len(ranks))], [f"rank {r}" for r in ranks])
    axes.set_xlabel(f"ms, steps {first} to {last}; black: the end of a step")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(picture, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draws what the command line says."""
    parser = argparse.ArgumentParser(description="Draw steps of a merged timeline.")
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, required=True)
    options = parser.parse_args()
    draw(json.loads(options.file.read_text()), options.picture, *options.steps)


if __name__ == "__main__":
    main()
