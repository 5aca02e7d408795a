"""FlatLayout: every element has one place and one owner, at any world size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from smorms3_dist.layout import (
    ALIGNED_BYTES,
    ALIGNMENT,
    FlatLayout,
    ParameterSpec,
    Segment,
    first_difference,
)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.sampled_from([(70, 60), (2049,)])
specs = st.lists(
    st.tuples(shapes, st.sampled_from(["float16", "float32", "float64"])), max_size=12
).map(lambda kinds: [ParameterSpec(f"/p{i}", *kind) for i, kind in enumerate(kinds)])
bucket_sizes = st.sampled_from([1, 1000, 4096, 1 << 30])
dense_layouts = st.builds(FlatLayout, specs, st.integers(1, 7), bucket_sizes)
layouts = st.builds(FlatLayout, specs, st.integers(1, 7), bucket_sizes, st.booleans())


@given(layouts)
def test_every_element_has_one_place_and_one_owner(layout: FlatLayout) -> None:
    for group in layout.groups:
        count = {slot.name: np.zeros(slot.size, int) for slot in group.slots}
        for shard in group.shards:
            parts = [bucket.part_of(shard.rank) for bucket in group.buckets]
            for segment in shard.segments:
                count[segment.slot.name][segment.range_p] += 1
                assert any(
                    part_f.start <= segment.start_f < segment.stop_f <= part_f.stop
                    for part_f in parts
                )
        assert all((times == 1).all() for times in count.values())
        # Parameters do not overlap. They start aligned, but for small ones in a dense layout.
        end = 0
        for slot in group.slots:
            if group.dense and slot.size * group.dtype.itemsize < ALIGNED_BYTES:
                assert slot.start_f == end
            else:
                assert slot.start_f * group.dtype.itemsize % ALIGNMENT == 0
                assert 0 <= slot.start_f - end < ALIGNMENT // group.dtype.itemsize
            end = slot.stop_f
        assert end <= group.size
        # Buckets cover the buffer in equal aligned parts.
        stops = [bucket.stop_f for bucket in group.buckets]
        assert [bucket.start_f for bucket in group.buckets[1:]] == stops[:-1]
        assert stops[-1:] in ([], [group.size])
        for bucket in group.buckets:
            assert bucket.stop_f - bucket.start_f == bucket.part_size * layout.world_size
            assert bucket.part_size * group.dtype.itemsize % ALIGNMENT == 0


@given(st.builds(FlatLayout, specs, st.integers(1, 7), bucket_sizes, st.just(False)))
def test_shard_coordinates_that_are_not_dense_are_those_of_the_parts_of_the_buckets(
    layout: FlatLayout,
) -> None:
    for group in layout.groups:
        for shard in group.shards:
            pieces = [
                group.piece_of_bucket(shard.rank, index) for index in range(len(group.buckets))
            ]
            for piece, bucket in zip(pieces, group.buckets, strict=True):
                assert piece.size == bucket.part_size
                part_start = bucket.part_of(shard.rank).start
                for segment in piece.segments:
                    assert segment.start_s - piece.start_s == segment.start_f - part_start
            assert tuple(s for piece in pieces for s in piece.segments) == shard.segments
            assert [piece.start_s for piece in pieces] == [0, *(p.stop_s for p in pieces)][:-1]
            assert shard.size == group.size // layout.world_size


@given(dense_layouts)
def test_shard_coordinates_are_dense(layout: FlatLayout) -> None:
    for group in layout.groups:
        for shard in group.shards:
            end = 0
            for segment in shard.segments:
                assert segment.start_s == end
                end = segment.stop_s
            assert end == shard.size
        assert sum(shard.size for shard in group.shards) == sum(slot.size for slot in group.slots)


@given(layouts, st.integers(1, 50))
@settings(max_examples=12)
def test_pieces_cover_a_shard_and_keep_to_the_limit(layout: FlatLayout, limit: int) -> None:
    def elements(segments: Iterable[Segment]) -> list[tuple[str, int]]:
        return [(s.slot.name, i) for s in segments for i in range(s.start_p, s.stop_p)]

    for group in layout.groups:
        for shard in group.shards:
            pieces = shard.pieces(limit)
            cut = [segment for piece in pieces for segment in piece.segments]
            assert elements(cut) == elements(shard.segments)
            assert all(0 < piece.size <= limit for piece in pieces)
            if group.dense:
                assert [piece.start_s for piece in pieces] == [0, *(p.stop_s for p in pieces)][:-1]
            for piece in pieces:
                assert piece.start_s == piece.segments[0].start_s
                assert piece.stop_s == piece.segments[-1].stop_s


def specs_of(dtype: str = "float32", **sizes: int) -> list[ParameterSpec]:
    return [ParameterSpec(f"/{name}", (size,), dtype) for name, size in sizes.items()]


def test_a_large_parameter_is_cut_on_its_own_and_small_ones_share_a_piece() -> None:
    (group,) = FlatLayout(specs_of(a=3, b=4, c=2500, d=5), 1).groups
    pieces = group.shards[0].pieces(1000)
    assert [[segment.slot.name for segment in piece.segments] for piece in pieces] == [
        *(["/a", "/b"], ["/c"], ["/c"], ["/c"], ["/d"])
    ]
    assert [piece.size for piece in pieces] == [7, 1000, 1000, 500, 5]


def test_a_piece_ends_where_a_part_of_a_bucket_ends_within_a_parameter() -> None:
    """Who packs a piece takes the parameters in it whole, but for the first and the last."""
    names = [f"{index:02}" for index in range(40)]
    layout = FlatLayout(specs_of(**dict.fromkeys(names, 50)), 3, 3 * 512)
    (group,) = layout.groups
    assert len(group.buckets) > 4
    cut = 0
    assert len(group.shards[0].pieces(1000)) == 1
    for shard in group.shards:
        for piece in shard.pieces(1000, inner_whole=True):
            assert all(s.size == s.slot.size for s in piece.segments[1:-1])
            for before, after in itertools.pairwise(piece.segments):
                assert (before.stop_p, after.start_p) == (before.slot.size, 0)
            cut += piece.segments[0].start_p > 0
    assert cut > 4


def test_offsets_beyond_32_bits_are_exact() -> None:
    big = 3 * 2**31 + 5
    layout = FlatLayout(
        [ParameterSpec("/a", (big,), "float32"), ParameterSpec("/b", (7, 2**30), "float32")], 3
    )
    (group,) = layout.groups
    assert group.slots[1].start_f == big + (-big) % 32
    assert sum(shard.size for shard in group.shards) == big + 7 * 2**30
    assert all(bucket.stop_f - bucket.start_f < 2**31 for bucket in group.buckets)
    last = group.shards[2].segments[-1]
    assert (last.slot.name, last.stop_p) == ("/b", 7 * 2**30)
    assert last.stop_f == group.slots[1].start_f + 7 * 2**30


def test_more_ranks_than_elements_leave_empty_shards() -> None:
    (group,) = FlatLayout(specs_of(a=3), 5).groups
    assert [shard.size for shard in group.shards] == [3, 0, 0, 0, 0]
    assert [shard.pieces(10) for shard in group.shards[1:]] == [()] * 4


def test_the_order_does_not_matter_and_each_dtype_has_a_group_of_its_own() -> None:
    a, c, b = *specs_of(a=3, c=4), *specs_of("float16", b=3)
    one, other = FlatLayout([c, b, a], 2), FlatLayout([a, b, c], 2)
    assert one.fingerprint == other.fingerprint
    for mine, theirs in zip(one.groups, other.groups, strict=True):
        assert (mine.slots, mine.shards) == (theirs.slots, theirs.shards)
    assert [(group.dtype.name, [slot.name for slot in group.slots]) for group in one.groups] == [
        ("float16", ["/b"]),
        ("float32", ["/a", "/c"]),
    ]


@pytest.mark.parametrize(
    ("changed", "on_first", "on_second"),
    [
        (ParameterSpec("/b", (4,), "float32"), (3,), (4,)),
        (ParameterSpec("/b", (3,), "float64"), (3,), (3,)),
        (ParameterSpec("/bb", (3,), "float32"), (3,), None),
    ],
)
def test_the_first_difference_of_two_models_is_found(
    changed: ParameterSpec, on_first: tuple[int] | None, on_second: tuple[int] | None
) -> None:
    a, b = ParameterSpec("/a", (1,), "float32"), ParameterSpec("/b", (3,), "float32")
    assert FlatLayout([a, b], 2).fingerprint != FlatLayout([a, changed], 2).fingerprint
    difference = first_difference([a, b], [a, changed])
    assert difference is not None
    assert tuple(spec and spec.shape for spec in difference) == (on_first, on_second)
    assert first_difference([a, b], [a, b]) is None


@pytest.mark.parametrize(
    ("specs", "world_size", "bucket_bytes", "message"),
    [
        ([ParameterSpec("/a", (1,), "float32")] * 2, 1, 1, "two parameters are named /a"),
        ([ParameterSpec("/a", (1,), "int32")], 1, 1, "/a has dtype int32"),
        ([], 0, 1, "world_size must be at least 1"),
        ([], 1, 0, "bucket_bytes must be positive"),
    ],
)
def test_impossible_layouts_are_refused(
    specs: list[ParameterSpec], world_size: int, bucket_bytes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FlatLayout(specs, world_size, bucket_bytes)
