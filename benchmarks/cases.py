"""The cases that only a checkout has: PyTorch, a loop in C, and checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.c_loop import compiler
from smorms3_dist.bench import suite
from smorms3_dist.bench.suite import Case
from smorms3_dist.bench.summary import CHAINERMN, OURS, OVER_LINK, PARTS

ROOT = Path(__file__).resolve().parent.parent

RESULTS = ROOT / "benchmarks" / "results"

PARTS = {
    **PARTS,
    "links": "A step on two hosts of this machine, a rank on each, 19M parameters",
    "checkpoint": "Saving and loading",
}

TWO_HOSTS = ROOT / "benchmarks" / "two_hosts.sh"
"""Makes two hosts of network namespaces with links of a rate, and runs a module on them."""

MAKERS = 3
"""Ranks that save what the others load as a checkpoint of another number of ranks."""


def can_import_torch(python: str) -> bool:
    command = [python, "-c", "import numpy, torch.distributed"]
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    except OSError:
        return False


def cases(torch_python: str | None) -> list[Case]:
    """All cases in their order, those of a part together, the systems of a name side by side.

    Args:
        torch_python: The interpreter that has PyTorch; ``None`` leaves its cases out.
    """
    known = [*suite.cases(), *_checkpoints(torch_python)]
    if TWO_HOSTS.exists() and os.geteuid() == 0 and shutil.which("tc"):
        known += _links(torch_python)
    if compiler() is not None:
        for elements, quick in ((1 << 24, False), (1 << 21, "alone")):
            name = f"all rules, {elements >> 20}M elements"
            arguments = ("--elements", str(elements))
            starter = (sys.executable,)
            known.append(
                Case("kernel", name, "c", 1, "benchmarks.peers.c_loop", arguments, quick, starter)
            )
    if torch_python is not None:
        known += _steps_of_torch(torch_python)
    parts, names = list(PARTS), list(dict.fromkeys(case.name for case in known))
    return sorted(known, key=lambda case: (parts.index(case.part), names.index(case.name)))


def _steps_of_torch(python: str) -> Iterator[Case]:
    program = "benchmarks.peers.torch_step"
    for workload in ("59M", "19M", "powers of two", "200 small", "2000 small"):
        arguments = ("--workload", workload)
        quick = workload == "19M"
        yield Case("step", workload, "ddp_zero", 2, program, arguments, quick, (python,))
        if workload == "59M":
            arguments += ("--amsgrad",)
            yield Case(
                "step", workload, "ddp_zero_amsgrad", 2, program, arguments, False, (python,)
            )


def _links(torch_python: str | None) -> Iterator[Case]:
    narrow = ("--option", "communication_dtype=bfloat16", "--option", "gather_dtype=bfloat16")
    for name, system, more in (
        ("1 Gbit/s", OURS, ()),
        ("1 Gbit/s, all in bfloat16", OURS, narrow),
        ("1 Gbit/s", CHAINERMN, ()),
        ("1 Gbit/s", "ddp_zero", ()),
        ("10 Gbit/s", OURS, ()),
        ("10 Gbit/s", CHAINERMN, ()),
        ("10 Gbit/s", "ddp_zero", ()),
    ):
        if system == "ddp_zero":
            if torch_python is None:
                continue
            peer, program, words = f"PEER_PYTHON={torch_python} ", "benchmarks.peers.torch_step", ()
        else:
            peer, program, words = "", "smorms3_dist.bench.update_step", ("--system", system)
        arguments = (*words, "--workload", "19M", *more)
        starter = _over_a_link(name.partition(" ")[0], peer)
        yield Case("links", name, system, 2, program, arguments, False, starter)
    for rate in ("1", "10"):
        name, program = f"64 MiB {OVER_LINK} {rate}", "smorms3_dist.bench.rank_exchanges"
        yield Case(
            *("exchange", name, OURS, 2, program, ("--over-tcp",)), False, _over_a_link(rate)
        )


def _over_a_link(rate: str, environment: str = "") -> tuple[str, ...]:
    """What starts a program on two hosts with a link of so many Gbit/s."""
    # The script begins with the module itself.
    command = f'shift; {environment}exec bash {TWO_HOSTS} {rate}gbit "$@"'
    return ("bash", "-c", command, "links")


def _checkpoints(torch_python: str | None) -> Iterator[Case]:
    for model in ("59M", "mixed", "5000 small", "5000 small as one"):
        arguments, program = ("--model", model), "benchmarks.peers.checkpoints_"
        small = model.startswith("5000 small")
        yield Case("checkpoint", model, OURS, 2, f"{program}ours", arguments, small, (), MAKERS)
        # With thousands of parameters, one save takes PyTorch minutes.
        if torch_python is not None and not small:
            starter = (torch_python,)
            yield Case(
                *("checkpoint", model, "torch", 2, f"{program}torch"),
                *(arguments, False, starter, MAKERS),
            )
