"""Saving and loading checkpoints: this project beside torch.distributed.checkpoint and plain files.

    python benchmarks/checkpoint.py [--directory D] [--rounds N] [--torch-python PATH]

Runs the systems in turn, round after round, each in processes of its own, and stores medians over
the rounds with what they were measured on. `benchmarks/README.md` says how to read them,
`benchmarks/peers/checkpoint.py` how exactly time and memory are measured. Run it with the
interpreter of an environment that has this project's requirements and an MPI.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import checkpoint_report, machine, report  # noqa: E402
from benchmarks.peers.checkpoint import MODELS  # noqa: E402
from benchmarks.running import can_import_torch, measured, mpirun  # noqa: E402

MAKERS = 3
"""Ranks that save what the others load as a checkpoint of another number of ranks."""

RANKS = 2

TORCH_MODELS = ("59M", "mixed")
"""The models that PyTorch is measured with: one save of the other takes it minutes."""


def main() -> None:
    options = parse_arguments()
    systems = [checkpoint_report.OURS]
    if options.torch_python:
        systems.append(checkpoint_report.TORCH)
    else:
        print(
            "PyTorch is skipped: this interpreter does not have it, and no --torch-python is given"
        )
    options.directory.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "machine": machine.describe() | {"file_system": machine.file_system(options.directory)},
        "ranks": RANKS,
        "makers": MAKERS,
        "rounds": options.rounds,
        "steps": options.steps,
        "runs": [],
    }
    for number in range(options.rounds):
        for model in options.models:
            for system in systems:
                if system == checkpoint_report.OURS or model in TORCH_MODELS:
                    run = {"round": number, "system": system, "model": model}
                    run |= measure(system, model, options)
                    result["runs"].append(run)
                    print(checkpoint_report.progress(run), flush=True)
    result["machine"]["load_average_at_end"] = os.getloadavg()
    text = checkpoint_report.markdown(result)
    print("\n" + text)
    for path in report.store(result, text, options.output, "checkpoint"):
        print(f"stored {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument(
        "--directory",
        type=Path,
        default=ROOT / ".cache",
        help="where a temporary directory for the checkpoints is made: choose the file system to "
        "measure (4 GB are needed; %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each system runs (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="saves and loads of a run (%(default)s)"
    )
    parser.add_argument("--torch-python", help="interpreter that has PyTorch and NumPy")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if min(options.rounds, options.steps) < 1:
        parser.error("--rounds and --steps must be at least 1")
    has_torch = can_import_torch(options.torch_python or sys.executable)
    if options.torch_python and not has_torch:
        parser.error(f"{options.torch_python} cannot import torch and numpy")
    if has_torch and not options.torch_python:
        options.torch_python = sys.executable
    return options


def measure(system: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Makes a checkpoint with other ranks, then measures a system; leaves no files."""
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=options.directory) as directory:

        def run(ranks: int, *arguments: str) -> dict[str, Any]:
            if system == checkpoint_report.TORCH:
                command = [options.torch_python, "-m", "benchmarks.peers.checkpoint_torch"]
            else:
                command = [mpirun(), "-n", str(ranks), sys.executable]
                command += ["-m", "benchmarks.peers.checkpoint_ours"]
            command += ["--model", model, "--directory", directory, "--ranks", str(ranks)]
            return measured([*command, *arguments], options.steps, f"{system} with {model}")

        run(MAKERS, "--make")
        return run(RANKS)


if __name__ == "__main__":
    main()
