"""What every transport of the collectives must do: run by threads and by MPI ranks alike."""

from __future__ import annotations

import functools
import math

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.collectives.narrowing import NarrowGradients, all_gather_narrow
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.narrow import SENT_AS, round_to
from smorms3_dist.layout import Bucket, FlatLayout, GroupLayout, ParameterSpec, Piece

import numpy as np

# With the smallest pieces, some shards have many of them and some have one or none.
SHAPES = [(3, 5), (1,), (7,), (), (100, 301), (0,), (13,), (2, 2), (12345,)]

DTYPES = ("float16", "float32", "float64")


def make_group(world_size: int, dtype: str, bucket_bytes: int = 1 << 30) -> GroupLayout:
    specs = [ParameterSpec(f"/p{i}", shape, dtype) for i, shape in enumerate(SHAPES)]
    return FlatLayout(specs, world_size, bucket_bytes).groups[0]


def values(group: GroupLayout, rank: int) -> list[np.ndarray]:
    """The gradient of each slot on a rank, of many magnitudes."""
    return _values(group.dtype.name, rank)


@functools.cache
def _values(dtype: str, rank: int) -> list[np.ndarray]:
    rng = np.random.RandomState(rank)
    return [
        (rng.standard_normal(size) * 10.0 ** rng.randint(-3, 3, size)).astype(dtype)
        for size in (math.prod(shape) for shape in SHAPES)
    ]


class Gradients:
    """The gradients of a rank, always packed."""

    def __init__(self, grads: list[np.ndarray]) -> None:
        self.grads = grads
        self.dtype = grads[0].dtype

    def read_piece(self, owner: int, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        for segment in piece.segments:
            start = segment.start_s - piece.start_s
            grad = self.grads[segment.slot.index]
            scratch[start : start + segment.size] = grad[segment.range_p]
        return scratch

    def pack_bucket(self, bucket: Bucket, out: np.ndarray, scale: float) -> None:
        raise AssertionError("pieces are read, not buckets")


def expected_mean(group: GroupLayout, world_size: int, index: int) -> np.ndarray:
    """The mean in the order of the ranks, float16 in float32."""
    wide = np.float32 if group.dtype == np.float16 else group.dtype.type
    total = values(group, 0)[index].astype(wide)
    for rank in range(1, world_size):
        total = total + values(group, rank)[index].astype(wide)
    return (total * wide(1.0 / world_size)).astype(group.dtype)


def check_reduce_scatter(collectives: Collectives) -> None:
    for dtype in DTYPES:
        group = make_group(collectives.size, dtype)
        shard = group.shards[collectives.rank]
        result = np.full(shard.size, np.nan, dtype)
        consumed = []

        def consume(piece: Piece, mean: Mean, result=result, consumed=consumed) -> None:
            consumed.append(piece)
            mean.evaluate(result[piece.start_s : piece.stop_s])

        before = collectives.bytes_sent["reduce_scatter"]
        collectives.reduce_scatter(group, Gradients(values(group, collectives.rank)), consume)
        assert tuple(consumed) == collectives.pieces(group)[collectives.rank]
        for segment in shard.segments:
            expected = expected_mean(group, collectives.size, segment.slot.index)
            np.testing.assert_array_equal(result[segment.range_s], expected[segment.range_p])
        # Everything but the own shard goes to its owner, once.
        elements = sum(other.size for other in group.shards) - shard.size
        sent = collectives.bytes_sent["reduce_scatter"] - before
        assert sent == elements * group.dtype.itemsize


def as_sent(values: np.ndarray, sent: str) -> np.ndarray:
    """Values as they arrive that are rounded before they are sent."""
    rounded = np.empty_like(values)
    round_to(SENT_AS[sent], values, rounded)
    return rounded


def check_narrow_reduce_scatter(collectives: Collectives) -> None:
    for dtype, sent in (("float32", "bfloat16"), ("float32", "float16"), ("float64", "float32")):
        group = make_group(collectives.size, dtype)
        shard = group.shards[collectives.rank]
        result = np.full(shard.size, np.nan, dtype)

        def consume(piece: Piece, mean: Mean, result=result) -> None:
            mean.evaluate(result[piece.start_s : piece.stop_s])

        before = collectives.bytes_sent["reduce_scatter"]
        whole = Gradients(values(group, collectives.rank))
        narrow = NarrowGradients(whole, SENT_AS[sent])
        collectives.reduce_scatter(group, narrow, consume)
        for segment in shard.segments:
            grads = [
                as_sent(values(group, rank)[segment.slot.index], sent)
                for rank in range(collectives.size)
            ]
            expected = functools.reduce(np.add, grads) * group.dtype.type(1 / collectives.size)
            np.testing.assert_array_equal(result[segment.range_s], expected[segment.range_p])
        elements = sum(other.size for other in group.shards) - shard.size
        expected_bytes = elements * SENT_AS[sent].itemsize
        assert collectives.bytes_sent["reduce_scatter"] - before == expected_bytes


def check_narrow_all_gather(collectives: Collectives) -> None:
    for dtype, sent in (("float32", "bfloat16"), ("float32", "float16"), ("float64", "float32")):
        for bucket_bytes in (1 << 30, 20_000):
            group = make_group(collectives.size, dtype, bucket_bytes)
            everything = np.linspace(0.1, 7, group.size, dtype=dtype)
            flat = np.zeros_like(everything)
            for bucket in group.buckets:
                part = bucket.part_of(collectives.rank)
                flat[part] = everything[part]
            before = collectives.bytes_sent["all_gather"]
            all_gather_narrow(collectives, flat, group.buckets, SENT_AS[sent])
            np.testing.assert_array_equal(flat, as_sent(everything, sent))
            nbytes = group.size // collectives.size * SENT_AS[sent].itemsize
            sent_bytes = collectives.bytes_sent["all_gather"] - before
            assert_all_sent(collectives, sent_bytes, nbytes)


def assert_all_sent(collectives: Collectives, sent: int, part: int) -> None:
    """Asserts that each part was sent to each other rank once, whoever has sent it there."""
    size = collectives.size
    assert sum(collectives.all_gather_object(sent)) == part * size * (size - 1)


def check_all_gather(collectives: Collectives) -> None:
    for dtype in DTYPES:
        for bucket_bytes in (1 << 30, 20_000):
            group = make_group(collectives.size, dtype, bucket_bytes)
            assert (len(group.buckets) > 1) == (bucket_bytes == 20_000)
            flat = np.zeros(group.size, dtype)
            expected = np.empty_like(flat)
            for bucket in group.buckets:
                for rank in range(collectives.size):
                    part = bucket.part_of(rank)
                    expected[part] = rank + 1
                    if rank == collectives.rank:
                        flat[part] = rank + 1
            before = collectives.bytes_sent["all_gather"]
            collectives.all_gather(flat, group.buckets)
            np.testing.assert_array_equal(flat, expected)
            sent = collectives.bytes_sent["all_gather"] - before
            assert_all_sent(collectives, sent, flat.nbytes // collectives.size)


def check_broadcast(collectives: Collectives) -> None:
    for dtype in DTYPES:
        for root in range(collectives.size):
            array = np.full((3, 7), collectives.rank, dtype)
            collectives.broadcast(array, root)
            np.testing.assert_array_equal(array, np.full((3, 7), root, dtype))


def check_flags_and_objects(collectives: Collectives) -> None:
    assert collectives.all_reduce_or(1 << collectives.rank) == (1 << collectives.size) - 1
    assert collectives.all_reduce_or(0) == 0
    assert collectives.all_gather_object(("a", collectives.rank)) == [
        ("a", rank) for rank in range(collectives.size)
    ]


CHECKS = (
    check_reduce_scatter,
    check_narrow_reduce_scatter,
    check_all_gather,
    check_narrow_all_gather,
    check_broadcast,
    check_flags_and_objects,
)
