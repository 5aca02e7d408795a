"""Memory that a step has freed is there for the next one."""

from __future__ import annotations

import textwrap
from pathlib import Path

from smorms3_dist.device import malloc

import fresh
import pytest

LARGE = 40 << 20
PAGES = LARGE // 4096

STEPS = textwrap.dedent(
    """
    import resource

    import smorms3_dist
    from smorms3_dist.device.malloc import keep_freed_memory
    import numpy as np

    {told}

    def faults(allocate):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        allocate()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def step():
        arrays = [np.ones(1 << 20, np.uint8) for _ in range(40)]
        large = np.ones({large}, np.uint8)

    step()
    # The system may have its own reasons once.
    print(min(faults(step) for _ in range(3)))
    """
)


def test_steps_fault_nothing_in_once_malloc_was_told(tmp_path: Path) -> None:
    def faults(told: str) -> int:
        return int(fresh.passes(tmp_path, STEPS.format(told=told, large=LARGE)))

    assert faults("pass") > PAGES / 2
    # The large array goes back; where the system has huge pages, it ends within one.
    assert faults("keep_freed_memory()") < PAGES / 10


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SMORMS3_MALLOC": "0"}, "SMORMS3_MALLOC=0"),
        ({"MALLOC_TRIM_THRESHOLD_": "100000"}, "MALLOC_TRIM_THRESHOLD_ is set"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=5"}, "GLIBC_TUNABLES"),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_ibt=off"}, ""),
        ({}, ""),
    ],
)
def test_who_has_decided_otherwise_is_left_alone(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*malloc._OF_GLIBC, "SMORMS3_MALLOC", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = malloc.keep_freed_memory.__wrapped__()
    assert (f"left as it is: {reason}" if reason else "keeps freed memory") in told


def test_the_first_sharded_update_on_a_host_tells_malloc(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import smorms3_dist
        import chainer
        from mpi4py import MPI
        from smorms3_dist.device import malloc

        link = chainer.links.Linear(3, 3)
        optimizer = smorms3_dist.create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), MPI.COMM_WORLD
        ).setup(link)
        print(malloc.keep_freed_memory.cache_info().currsize)
        link.cleargrads()
        optimizer.update()
        print(malloc.keep_freed_memory.cache_info().currsize)
        """
    )
    assert fresh.passes(tmp_path, program).split() == ["0", "1"]
