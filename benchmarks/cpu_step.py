"""Optimizer and communication of a training step on CPUs: this project beside its peers.

    python benchmarks/cpu_step.py [--sizes 19 59] [--rounds N] [--steps N] [--torch-python PATH]

Runs the systems in turn, round after round, each in processes of its own, and stores medians over
the rounds with what they were measured on. `benchmarks/README.md` says how to read them,
`benchmarks/peers/measure.py` how exactly time and memory are measured. Run it with the interpreter
of an environment that has this project's requirements and an MPI.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cpu_step_report, machine, report  # noqa: E402
from benchmarks.peers.measure import WIDTHS  # noqa: E402
from benchmarks.running import can_import_torch, measured, mpirun  # noqa: E402


class Peer(NamedTuple):
    """How a system is run.

    Attributes:
        name: What results call it.
        module: The module to run.
        options: Further arguments for it.
        torch: Whether it starts its ranks itself, in PyTorch's interpreter; else mpirun does.
    """

    name: str
    module: str
    options: tuple[str, ...] = ()
    torch: bool = False


CHAINER_PEERS = (
    Peer(name + suffix, "benchmarks.peers.chainer_mlp", ("--optimizer", name, *options))
    for suffix, options in (("", ()), ("_hooks", ("--hooks",)), ("_adam", ("--rule", "Adam")))
    for name in ("smorms3_dist", "chainermn")
)
PEERS = (
    *CHAINER_PEERS,
    Peer("ddp_zero", "benchmarks.peers.torch_mlp", torch=True),
    Peer("ddp_zero_amsgrad", "benchmarks.peers.torch_mlp", ("--amsgrad",), torch=True),
)


def main() -> None:
    options = parse_arguments()
    peers = [
        peer
        for peer in PEERS
        if peer.name in options.peers and (options.torch_python or not peer.torch)
    ]
    if not options.torch_python:
        print(
            "PyTorch is skipped: this interpreter does not have it, and no --torch-python is given"
        )
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "ranks": options.ranks,
        "rounds": options.rounds,
        "steps": options.steps,
        "runs": [],
        "kernel": [],
    }
    for number in range(options.rounds):
        for size in options.sizes:
            for peer in peers:
                command = peer_command(peer, size, options)
                run = measured(command, options.steps, f"{peer.name} at {size}M")
                run = {"round": number, "peer": peer.name, "size": size} | run
                result["runs"].append(run)
                print(cpu_step_report.progress(run), flush=True)
        kernel = [sys.executable, "-m", "benchmarks.kernel"]
        result["kernel"].append(measured(kernel, options.steps, "the kernel against C"))
    result["machine"]["load_average_at_end"] = os.getloadavg()
    text = cpu_step_report.markdown(result)
    print("\n" + text)
    for path in report.store(result, text, options.output, "cpu-step"):
        print(f"stored {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--sizes", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each peer runs (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=9, help="timed steps of a run (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a peer (%(default)s)")
    parser.add_argument("--torch-python", help="interpreter that has PyTorch and NumPy")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.ranks) < 1:
        parser.error("--rounds, --steps and --ranks must be at least 1")
    has_torch = can_import_torch(options.torch_python or sys.executable)
    if options.torch_python and not has_torch:
        parser.error(f"{options.torch_python} cannot import torch and numpy")
    if has_torch and not options.torch_python:
        options.torch_python = sys.executable
    return options


def peer_command(peer: Peer, size: str, options: argparse.Namespace) -> list[str]:
    if peer.torch:
        command = [options.torch_python]
    else:
        command = [mpirun(), "-n", str(options.ranks), sys.executable]
    return [
        *command,
        *("-m", peer.module, *peer.options, "--size", size, "--ranks", str(options.ranks)),
    ]


if __name__ == "__main__":
    main()
