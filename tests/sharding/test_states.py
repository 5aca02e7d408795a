"""The states of a shard: arrays in one block of memory, which another block can replace."""

from __future__ import annotations

import copy
import pickle

from smorms3_dist.collectives.base import empty_on_host
from smorms3_dist.device.memory import PARAMETERS, STATES, HostMemory
from smorms3_dist.layout import ALIGNMENT
from smorms3_dist.sharding.states import States

import numpy as np
import pytest

DTYPES = {"mem": np.dtype("f4"), "g": np.dtype("f2"), "g2": np.dtype("f8")}


def filled(size: int) -> States:
    states = States(HostMemory(), size, DTYPES, "a rule")
    for index, values in enumerate(states.values()):
        values[...] = np.arange(size) + 100 * index
    return states


def contents(states: States) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in states.items()}


@pytest.mark.parametrize("size", [0, 1, 3, 7, 64, 1000])
def test_arrays_do_not_overlap_and_start_aligned(size: int) -> None:
    states = filled(size)
    assert {name: values.dtype for name, values in states.items()} == DTYPES
    assert [len(values) for values in states.values()] == 3 * [size]
    assert contents(states) == {
        "mem": list(range(size)),
        "g": [100 + i for i in range(size)],
        "g2": [200 + i for i in range(size)],
    }
    start = states.block.ctypes.data
    assert all((values.ctypes.data - start) % ALIGNMENT == 0 for values in states.values() if size)


@pytest.mark.parametrize("size", [1 << 10, 1 << 12, 12345])
def test_no_two_streams_of_an_update_have_the_same_place_in_a_page(size: int) -> None:
    memory, four = HostMemory(), np.dtype(np.float32)
    states = States(memory, size, dict.fromkeys(("mem", "g", "g2"), four), "a rule")
    fresh = memory.empty(states.block.size, np.dtype(np.uint8), "a checkpoint", STATES)
    others = [memory.zeros(size, four, "parameters", PARAMETERS), empty_on_host(size, four)]
    for block in (states.block, fresh):
        streams = [*states.views_of(block).values(), *others]
        # Gradients are Chainer's: large arrays start with a page.
        offsets = sorted([0, *(values.ctypes.data % memory.page for values in streams)])
        distances = np.diff([*offsets, memory.page])
        assert distances.min() >= memory.page // 8


def test_a_copy_of_the_block_holds_copies_and_a_block_is_taken_without_a_copy() -> None:
    states, other = filled(7), filled(7)
    views = states.views_of(states.block.copy())
    assert {name: values.tolist() for name, values in views.items()} == contents(states)
    views["g"][...] = 0
    assert contents(states) == contents(filled(7))
    other["mem"][3] = -1
    states.replace_block(other.block)
    assert contents(states) == contents(other)
    assert states.block is other.block


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_arrays_of_a_copy_are_views_of_its_block(copied: object) -> None:
    assert callable(copied)
    states = filled(7)
    other = copied(states)
    assert contents(other) == contents(states)
    assert all(np.shares_memory(values, other.block) for values in other.values())
    other["g2"][...] = 5
    assert contents(states) == contents(filled(7))


def test_there_may_be_no_arrays() -> None:
    states = States(HostMemory(), 7, {}, "a rule")
    assert len(states) == 0 and states.block.size == 0
