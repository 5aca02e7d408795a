"""Flat buffers: parameters are views of them, gradients are read where they are."""

from __future__ import annotations

import pickle
import weakref

from smorms3_dist.device.memory import HostMemory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import FlatLayout, ParameterSpec, Piece
from smorms3_dist.sharding.buffers import FlatBuffers

import chainer
import numpy as np
import pytest

SPECS = [ParameterSpec("/a", (2, 3), "float32"), ParameterSpec("/b", (4,), "float32")]


def buffers_of(dense: bool = True) -> FlatBuffers:
    (group,) = FlatLayout(SPECS, 1, 1 << 20, dense).groups
    values = np.arange(6, dtype="f").reshape(2, 3), np.arange(10, 14, dtype="f")
    return FlatBuffers(group, [chainer.Parameter(array) for array in values], HostMemory())


def test_parameters_are_views_and_arrays_that_are_given_are_taken_over() -> None:
    buffers = buffers_of()
    a, b = buffers.params
    assert buffers.flat.ctypes.data % 128 == 0
    assert a.array.tolist() == [[0, 1, 2], [3, 4, 5]]
    a.array = np.full((2, 3), 7, "f")
    buffers.adopt()
    for (slot, param), value in zip(buffers.parameters(), (7, 10), strict=True):
        assert np.shares_memory(param.array, buffers.flat)
        assert param.array.flags.c_contiguous
        assert buffers.flat[slot.start_f] == value == param.array.flat[0]
    b.array[0] = 9
    assert buffers.flat[buffers.layout.slots[1].start_f] == 9


def test_the_array_that_a_parameter_was_made_of_is_freed() -> None:
    array = np.arange(4, dtype="f")
    given, param = weakref.ref(array), chainer.Parameter(array)
    del array
    (group,) = FlatLayout(SPECS[1:], 1, 1 << 20).groups
    buffers = FlatBuffers(group, [param], HostMemory())
    assert given() is None
    assert param.initializer is param.array is buffers.params[0].array


def test_a_copy_has_views_of_a_buffer_of_its_own() -> None:
    buffers = buffers_of()
    twin = pickle.loads(pickle.dumps(buffers))
    twin.params[0].array[...] = 8
    assert twin.flat[:6].tolist() == [8] * 6
    assert buffers.params[0].array.max() == 5


@pytest.mark.parametrize("dense", [True, False])
def test_a_piece_is_a_view_of_one_gradient_or_packed_with_zeros_for_none(dense: bool) -> None:
    buffers = buffers_of(dense)
    a, b = buffers.params
    a.grad, b.grad = np.arange(6, dtype="f").reshape(3, 2).T, None
    (piece,) = buffers.layout.shards[0].pieces(1000)
    first = Piece(piece.start_s, piece.start_s + 6, piece.segments[:1])
    scratch = np.full(piece.size, np.nan, "f")
    with buffers.gradients():
        packed = buffers.read_piece(0, piece, scratch)
        assert packed is scratch
        assert packed[:6].tolist() == [0, 2, 4, 1, 3, 5]
        assert packed[6:].tolist() == [0] * (piece.size - 6)
        assert buffers.read_piece(0, first, scratch) is not scratch
        assert buffers.read_piece(0, first, scratch).tolist() == [0, 2, 4, 1, 3, 5]
        a.grad = None
    with buffers.gradients():
        assert buffers.read_piece(0, first, scratch[:6]).tolist() == [0] * 6


def test_whole_gradients_are_views_of_a_buffer_that_is_made_when_it_is_asked_for() -> None:
    buffers = buffers_of()
    (piece,) = buffers.layout.shards[0].pieces(1000)
    buffers.store_piece(piece, Mean(np.arange(10, dtype="f")))
    buffers.expose_flat_grad()
    assert [param.grad.ravel().tolist() for param in buffers.params] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9],
    ]
    buffers.params[1].grad[0] = -1
    assert buffers.flat_grad[buffers.layout.slots[1].start_f] == -1
    buffers.clear_gradients()
    assert [param.grad for param in buffers.params] == [None, None]
