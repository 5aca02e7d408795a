"""Children that are forked from a process with a GPU are told of: once, on rank 0."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import multiprocessing, os, subprocess
from smorms3_dist.device.forks import tell_of_forks
def start(method):
    process = multiprocessing.get_context(method).Process(target=int)
    process.start()
    process.join()
    print(method, flush=True)
if __name__ == "__main__":
    start("fork")
    for _ in range(2):
        tell_of_forks({rank})
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    subprocess.run(["true"], preexec_fn=os.getpid)
    start("spawn")
    print("before", flush=True)
    start("fork")
    start("fork")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_fork_of_a_child_is_told_of(rank: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CODE.replace("{rank}", str(rank))]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith("a child is forked while this rank has")]
    assert len(told) == (rank == 0)
    if told:
        assert "set_start_method('forkserver')" in told[0]
        assert lines[lines.index("before") + 1] == told[0]
    assert lines.count("fork") == 3
