"""Which element of which parameter lies where, and which rank owns it.

The parameters of a *group* (one dtype, one kind of update) lie one behind the other, ordered by
name, in one flat buffer. The buffer is cut into *buckets*, every bucket into one equal part a rank;
the parts of a rank are its *shard*. Where a parameter and a shard overlap is a *segment*.
Everything here is arithmetic on Python integers (no arrays, no communication, no 32-bit limits), so
every rank computes the whole picture, everybody's shard included, by itself.

An element has an offset in each of four coordinates, always counted in elements. Names end in the
one that they are in, here and wherever layouts are used; a line that mixes them is wrong::

    _p   in its parameter, flattened            0 ... slot.size
    _s   in the shard of its owner              0 ... shard.size      states, staged gradients
    _f   in the flat buffer of its group        0 ... layout.size     parameters, whole gradients
    _b   in its bucket                          0 ... bucket.size     what is sent at once

In the flat buffer parameters start at aligned offsets and so leave gaps; in a *dense* layout, which
is for CPUs, only large ones do. There shards have no gaps at all: states hold not one element more
than the parameters have.
Otherwise the shard is the rank's parts of the buckets as they are, one behind the other, gaps and
padding included: parameter, gradient and states of an element are then aligned alike, as vectorized
kernels on GPUs want them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

ALIGNMENT = 128
"""Bytes. Parameters and shards start at multiples of it: a cache line pair on CPUs, and what
vectorized kernels and matrix libraries on GPUs want of a pointer."""

ALIGNED_BYTES = 1 << 14
"""In a dense layout, smaller parameters touch the one before: on CPUs, neighbours without a gap are
updated by one call, and that counts for more than where each of them starts."""

BUCKET_BYTES = 1 << 30
"""Largest bucket. Below 2**31 bytes, so that no message count overflows the C int of MPI-3."""

GPU_BUCKET_BYTES = 1 << 26
"""The same on GPUs, for few ranks: see `gpu_bucket_bytes`."""

_RANKS_A_BUCKET = 16
"""Ranks that share the smallest bucket of GPUs: each has 4 MiB of it, below which messages between
hosts do not reach the speed of their network."""


def gpu_bucket_bytes(world_size: int, smallest: int = GPU_BUCKET_BYTES) -> int:
    """Largest size of a bucket on GPUs, which grows so that a rank's part of it does not shrink."""
    return smallest * -(-world_size // _RANKS_A_BUCKET)


def early_gpu_bucket_bytes(world_size: int) -> int:
    """The same where gradients are reduced during the backward pass.

    Smaller ones: the last is still to be reduced when the pass ends, and only for that one it
    counts how fast it is.
    """
    return max(GPU_BUCKET_BYTES // 2, world_size << 20)


class ParameterSpec(NamedTuple):
    """What all ranks must agree on about one parameter.

    Attributes:
        name: Path of the parameter in the link, such as ``/l1/W``.
        shape: Shape of its array.
        dtype: Name of its dtype, such as ``float32``.
        update: How it is updated, as far as the parameters of a group must be alike: in words, such
            as ``SMORMS3Rule in float32``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    update: str = ""


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one parameter in its group's flat buffer.

    Attributes:
        name: Path of the parameter in the link.
        shape: Shape of the parameter.
        index: Position among the slots of the group.
        start_f: First element.
        size: Number of elements.
    """

    name: str
    shape: tuple[int, ...]
    index: int
    start_f: int
    size: int

    @property
    def stop_f(self) -> int:
        """One past the last element."""
        return self.start_f + self.size


class Segment(NamedTuple):
    """The overlap of one parameter with one shard (or with a piece of it).

    Attributes:
        slot: The parameter's place in the flat buffer.
        start_p: First element.
        stop_p: One past the last element.
        start_s: First element, in the shard of the owner.
    """

    slot: Slot
    start_p: int
    stop_p: int
    start_s: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop_p - self.start_p

    @property
    def stop_s(self) -> int:
        """One past the last element, in the shard of the owner."""
        return self.start_s + self.stop_p - self.start_p

    @property
    def start_f(self) -> int:
        """First element, in the flat buffer."""
        return self.slot.start_f + self.start_p

    @property
    def stop_f(self) -> int:
        """One past the last element, in the flat buffer."""
        return self.slot.start_f + self.stop_p

    @property
    def range_p(self) -> slice:
        """The segment's range of the flattened parameter."""
        return slice(self.start_p, self.stop_p)

    @property
    def range_f(self) -> slice:
        """The segment's range of the flat buffer."""
        return slice(self.start_f, self.stop_f)

    @property
    def range_s(self) -> slice:
        """The segment's range of arrays in shard coordinates."""
        return slice(self.start_s, self.stop_s)


class Bucket(NamedTuple):
    """A range of the flat buffer that is gathered by one collective, one equal part a rank.

    Attributes:
        start_f: First element.
        stop_f: One past the last element.
        part_size: Elements that each rank owns of it.
    """

    start_f: int
    stop_f: int
    part_size: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop_f - self.start_f

    def part_of(self, rank: int) -> slice:
        """The range of the flat buffer that a rank owns of this bucket."""
        start_f = self.start_f + rank * self.part_size
        return slice(start_f, start_f + self.part_size)


class Piece(NamedTuple):
    """A range of one shard that is reduced at once.

    It holds either a part of one large segment, which can be sent straight from the gradient, or
    several small segments, which have to be packed.

    Attributes:
        start_s: First element.
        stop_s: One past the last element.
        segments: What lies in it, in order; in a dense layout without gaps.
    """

    start_s: int
    stop_s: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop_s - self.start_s

    @property
    def range_s(self) -> slice:
        """The piece's range of arrays in shard coordinates."""
        return slice(self.start_s, self.stop_s)


class Shard(NamedTuple):
    """What one rank owns of a group.

    Attributes:
        rank: The owner.
        size: Number of elements; of a dense layout, gaps and padding not counted.
        segments: The overlaps with parameters, in the order of the flat buffer.
    """

    rank: int
    size: int
    segments: tuple[Segment, ...]

    def pieces(self, limit: int, inner_whole: bool = False) -> tuple[Piece, ...]:
        """Cuts the shard into pieces of at most ``limit`` elements.

        Segments of at least an eighth of the limit are cut on their own; shorter neighbours share a
        piece. With ``inner_whole`` only the first and the last of these may be a part of its
        parameter: where the part of a bucket ends within one, so does the piece.
        """
        pieces: list[Piece] = []
        packed: list[Segment] = []
        for segment in self.segments:
            alone = segment.size * 8 >= limit
            last = packed[-1] if packed else segment
            cut = last.stop_p < last.slot.size or segment.start_p > 0
            ends = alone or (inner_whole and cut)
            if packed and (ends or segment.stop_s - packed[0].start_s > limit):
                pieces.append(_piece(packed))
                packed = []
            if alone:
                pieces.extend(_piece([part]) for part in _cut(segment, limit))
            else:
                packed.append(segment)
        if packed:
            pieces.append(_piece(packed))
        return tuple(pieces)


def _piece(segments: Sequence[Segment]) -> Piece:
    return Piece(segments[0].start_s, segments[-1].stop_s, tuple(segments))


def _cut(segment: Segment, limit: int) -> Iterator[Segment]:
    for start_p in range(segment.start_p, segment.stop_p, limit):
        yield segment._replace(
            start_p=start_p,
            stop_p=min(start_p + limit, segment.stop_p),
            start_s=segment.start_s + (start_p - segment.start_p),
        )


# Compared by identity, so that what depends on a layout can be kept beside it.
@dataclasses.dataclass(frozen=True, eq=False)
class GroupLayout:
    """The flat buffer of the parameters of one dtype that are updated alike.

    Attributes:
        dtype: The dtype of parameters and gradients.
        update: How they are updated, as in `ParameterSpec`.
        slots: The parameters, in the order of the buffer.
        size: Elements of the flat buffer, gaps and padding included; a multiple of world size x 128
            bytes.
        buckets: The ranges that are gathered at once; they cover the buffer.
        world_size: Number of ranks.
        dense: Whether shards are without gaps.
    """

    dtype: np.dtype
    update: str
    slots: tuple[Slot, ...]
    size: int
    buckets: tuple[Bucket, ...]
    world_size: int
    dense: bool = True

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple([slot.name for slot in self.slots])

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the parameters."""
        return tuple([slot.shape for slot in self.slots])

    # When they are asked for: a plan for thousands of ranks needs the sizes above alone.
    @functools.cached_property
    def shards(self) -> tuple[Shard, ...]:
        """What each rank owns, by rank."""
        return _deal(self.slots, self.buckets, self.world_size, self.dense)

    @functools.cached_property
    def slots_of_buckets(self) -> dict[Bucket, tuple[Slot, ...]]:
        """The parameters that have elements in each bucket."""
        return {
            bucket: tuple(
                slot
                for slot in self.slots
                if max(slot.start_f, bucket.start_f) < min(slot.stop_f, bucket.stop_f)
            )
            for bucket in self.buckets
        }

    def piece_of_bucket(self, rank: int, index: int) -> Piece:
        """What a rank owns of a bucket, as a piece; not of dense layouts."""
        assert not self.dense
        start_s = sum(bucket.part_size for bucket in self.buckets[:index])
        stop_s = start_s + self.buckets[index].part_size
        segments = self.shards[rank].segments
        inside = (segment for segment in segments if start_s <= segment.start_s < stop_s)
        return Piece(start_s, stop_s, tuple(inside))

    @functools.cached_property
    def segments(self) -> tuple[tuple[tuple[int, Segment], ...], ...]:
        """Where each parameter lies: by slot, the segments with the ranks that own them."""
        owners: list[list[tuple[int, Segment]]] = [[] for _ in self.slots]
        for shard in self.shards:
            for segment in shard.segments:
                owners[segment.slot.index].append((shard.rank, segment))
        return tuple(tuple(sorted(of, key=lambda item: item[1].start_p)) for of in owners)


class FlatLayout:
    """The layout of a whole model over a number of ranks.

    Args:
        specs: The initialized parameters. Their names must be unique; their order does not matter.
        world_size: Number of ranks.
        bucket_bytes: Largest size of a bucket in bytes; at least one alignment unit a rank is
            taken.
        dense: Whether shards are without gaps.

    Attributes:
        specs: The parameters by name.
        world_size: Number of ranks.
        groups: One layout for each dtype and way to update, in the order of their names.

    Raises:
        ValueError: If a name occurs twice, a dtype is not a floating one, or an argument is not
            positive.
    """

    def __init__(
        self,
        specs: Iterable[ParameterSpec],
        world_size: int,
        bucket_bytes: int = BUCKET_BYTES,
        dense: bool = True,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, not {world_size}")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be positive, not {bucket_bytes}")
        self.specs = tuple(sorted(specs))
        self.world_size = world_size
        names: set[str] = set()
        groups: dict[tuple[str, str], list[ParameterSpec]] = {}
        for spec in self.specs:
            if spec.name in names:
                raise ValueError(f"two parameters are named {spec.name}")
            if np.dtype(spec.dtype).kind != "f":
                raise ValueError(
                    f"parameter {spec.name} has dtype {spec.dtype}; only float16, float32 and "
                    "float64 parameters can be updated"
                )
            names.add(spec.name)
            groups.setdefault((spec.dtype, spec.update), []).append(spec)
        self.groups = tuple(
            _lay_out(
                np.dtype(dtype), update, groups[dtype, update], world_size, bucket_bytes, dense
            )
            for dtype, update in sorted(groups)
        )

    @property
    def fingerprint(self) -> str:
        """A digest of the parameters: equal on two ranks exactly if their layouts are."""
        return hashlib.sha256(repr(self.specs).encode()).hexdigest()


def _lay_out(
    dtype: np.dtype,
    update: str,
    specs: Sequence[ParameterSpec],
    world_size: int,
    bucket_bytes: int,
    dense: bool,
) -> GroupLayout:
    # Elements of any float dtype fill the alignment evenly, so offsets in elements stay exact.
    unit = ALIGNMENT // dtype.itemsize
    slots = []
    end = 0
    for index, spec in enumerate(specs):
        size = math.prod(spec.shape)
        if not dense or size * dtype.itemsize >= ALIGNED_BYTES:
            end = _round_up(end, unit)
        slots.append(Slot(spec.name, spec.shape, index, end, size))
        end += size
    whole = unit * world_size
    total = _round_up(end, whole)
    bucket_size = max(bucket_bytes // dtype.itemsize // whole, 1) * whole
    buckets = tuple(
        Bucket(start, stop, (stop - start) // world_size)
        for start in range(0, total, bucket_size)
        for stop in [min(start + bucket_size, total)]
    )
    return GroupLayout(dtype, update, tuple(slots), total, buckets, world_size, dense)


def _deal(
    slots: Sequence[Slot], buckets: Sequence[Bucket], world_size: int, dense: bool
) -> tuple[Shard, ...]:
    """Intersects the slots with the parts of all ranks; both are in the order of the buffer."""
    segments: list[list[Segment]] = [[] for _ in range(world_size)]
    sizes = [0] * world_size
    remaining = iter(slots)
    slot = next(remaining, None)
    bucket_s = 0
    for bucket in buckets:
        for rank in range(world_size):
            part_f = bucket.part_of(rank)
            while slot is not None and slot.start_f < part_f.stop:
                start_p = max(part_f.start - slot.start_f, 0)
                stop_p = min(part_f.stop - slot.start_f, slot.size)
                if start_p < stop_p:
                    aligned_s = bucket_s + (slot.start_f + start_p - part_f.start)
                    start_s = sizes[rank] if dense else aligned_s
                    segments[rank].append(Segment(slot, start_p, stop_p, start_s))
                    sizes[rank] += stop_p - start_p
                if slot.stop_f > part_f.stop:
                    break
                slot = next(remaining, None)
        bucket_s += bucket.part_size
    return tuple(
        Shard(rank, sizes[rank] if dense else bucket_s, tuple(segments[rank]))
        for rank in range(world_size)
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def first_difference(
    ours: Sequence[ParameterSpec], theirs: Sequence[ParameterSpec]
) -> tuple[ParameterSpec | None, ParameterSpec | None] | None:
    """Finds where two models part.

    Args:
        ours: Parameters of one rank, sorted by name.
        theirs: Parameters of another rank, sorted by name.

    Returns:
        The first pair, by name, that differs, ``None`` standing for a parameter that the side does
        not have; or ``None`` where the two are equal.
    """
    mine = {spec.name: spec for spec in ours}
    other = {spec.name: spec for spec in theirs}
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            return mine.get(name), other.get(name)
    return None
