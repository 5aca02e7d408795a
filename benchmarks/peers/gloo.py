"""Ranks that communicate over gloo, for peers that run PyTorch."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from smorms3_dist.bench import clock

import torch
import torch.distributed as dist
import torch.multiprocessing

Run = Callable[[clock.Ranks, argparse.Namespace], None]


def spawn(run: Run, options: argparse.Namespace) -> None:
    """Starts the ranks, and waits for them; or is one of those that mpirun has started.

    Args:
        run: What every rank does: a function that a new process can import.
        options: What it is given; see `smorms3_dist.bench.clock.arguments`.
    """
    clock.end_after(options.limit)
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
        return _run_rank(rank, run, options, f"{options.result}.store")
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        torch.multiprocessing.spawn(_run_rank, (run, options, store), nprocs=options.ranks)


def _run_rank(rank: int, run: Run, options: argparse.Namespace, store: str) -> None:
    clock.end_after(options.limit)
    torch.set_num_threads(1)
    # Without it gloo looks for its address under the machine's name, which need not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=options.ranks)

    def gather(value: object) -> list[object]:
        values: list[object] = [None] * options.ranks
        dist.all_gather_object(values, value)
        return values

    run(clock.Ranks(rank, dist.barrier, gather), options)

    dist.destroy_process_group()


def versions() -> dict[str, str]:
    """The versions of the software."""
    return {"PyTorch": torch.__version__}
