"""Fingerprints of what a rank has: equal for equal bits, and a few bytes each.

Host memory is hashed by XXH3. On a GPU the words of an array are summed up, each times an odd
number that depends on where it stands, so that nothing but the sums leaves the device. Either reads
the bits: nan is equal to a nan of the same payload, and 0.0 differs from -0.0.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.links import arrays_of, persistent_values_of
from smorms3_dist.device.memory import Memory, assign
from smorms3_dist.sharding.model import ModelView

import numpy as np
import xxhash

PIECE = 1 << 20
"""Words that are hashed at once on a GPU: two arrays of as many uint64 are all the memory used."""

_SAMPLED = 128
"""Elements of a group that are looked at before each step."""

_MODULUS = 1 << 64

PARAMETER, PERSISTENT_VALUE = "parameter ", "persistent value "
"""What stands before the path of either."""


class Fingerprint(NamedTuple):
    """What a rank has under a name.

    Attributes:
        name: The kind and the name: ``parameter /l1/W``, ``persistent value /bn/avg_mean``.
        what: Its dtype and shape, in words; or its type, if it is no array.
        digest: Of its bits.
    """

    name: str
    what: str
    digest: int


def fingerprints_of(
    model: ModelView, memory: Memory, persistent: bool, flats: Sequence[Any] | None = None
) -> list[Fingerprint]:
    """Takes the fingerprints of all parameters, also of those that nothing updates.

    Args:
        model: The model.
        memory: Where it is.
        persistent: Whether the persistent values of its links are added.
        flats: The buffers in which all initialized parameters lie. Their fingerprints are taken in
            the place of those of the parameters, at a fraction of the time for many small ones.
    """
    params = sorted(model.parameters() if flats is None else model.uninitialized.items(), key=_name)
    names = [PARAMETER + name for name, _ in params]
    values = list(zip(names, arrays_of(param for _, param in params), strict=True))
    values += [(f"flat buffer {index}", flat) for index, flat in enumerate(flats or ())]
    if persistent:
        values += [
            (PERSISTENT_VALUE + path, getattr(owner, name))
            for path, owner, name in persistent_values_of(model.link)
        ]
    on_device = [value for _, value in values if hasattr(value, "get") and hasattr(value, "dtype")]
    device_digests = iter(hash_on_device(on_device, memory) if on_device else ())
    found = []
    for name, value in values:
        if type(value) is np.ndarray:
            found.append(Fingerprint(name, _words_for(value), hash_on_host(value)))
            continue
        if value is None:
            what = "not initialized" if name.startswith(PARAMETER) else "None"
            found.append(Fingerprint(name, what, 0))
            continue
        if isinstance(value, (float, np.generic)):
            value = np.asarray(value)
        if not hasattr(value, "dtype"):
            what, digest = type(value).__name__, xxhash.xxh3_64_intdigest(repr(value).encode())
        else:
            what = _words_for(value)
            digest = next(device_digests) if hasattr(value, "get") else hash_on_host(value)
        found.append(Fingerprint(name, what, digest))
    return found


_name = operator.itemgetter(0)

# NumPy takes longer to name a dtype than to hash a small array.
_name_of = functools.cache(str)


def _words_for(array: Any) -> str:
    return f"{_name_of(array.dtype)} of shape {tuple(array.shape)}"


def sample(flat: np.ndarray) -> np.ndarray:
    """A copy of a few elements of a flat buffer in host memory, all over it."""
    return flat[:: _distance(flat)].copy()


def sample_again(flat: np.ndarray, start: int, stop: int, before: np.ndarray) -> None:
    """Brings a `sample` up to date, of the elements in a range of the buffer."""
    distance = _distance(flat)
    first, last = -(-start // distance), -(-stop // distance)
    before[first:last] = flat[first * distance : stop : distance]


def _distance(flat: np.ndarray) -> int:
    return max(flat.size // _SAMPLED, 1)


def combined(fingerprints: Sequence[Fingerprint]) -> int:
    """One digest of many fingerprints."""
    return xxhash.xxh3_64_intdigest(repr([tuple(each) for each in fingerprints]).encode())


def hash_on_host(array: np.ndarray) -> int:
    """The digest of an array in host memory, which is not copied."""
    if array.flags.c_contiguous:
        return xxhash.xxh3_64_intdigest(array.data)
    hasher = xxhash.xxh3_64()
    for piece in pieces_of(array):
        hasher.update(piece.view(np.uint8).data)
    return hasher.intdigest()


def pieces_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """The elements of an array in host memory in C's order, in contiguous pieces.

    Pieces of what is not contiguous are copies, valid until the next.
    """
    if array.flags.c_contiguous:
        yield array.reshape(-1)
    elif array.size:
        flags = ["external_loop", "buffered"]
        for piece in np.nditer(array, flags, order="C", buffersize=1 << 16):  # type: ignore
            yield np.ascontiguousarray(piece)


def hash_on_device(arrays: Sequence[Any], memory: Memory) -> list[int]:
    """The digests of arrays on a GPU; waits for it once.

    The digest of words w is the sum of w[i] * `multipliers`[i % PIECE] * `multiplier_of_piece`(i //
    PIECE), modulo 2**64. Multipliers are odd: one word that differs is always found.
    """
    words = [_words(array) for array in arrays]
    counts = [-(-each.size // PIECE) for each in words]
    largest = min(max((each.size for each in words), default=0), PIECE)
    what = "a piece of the parameters that ranks compare"
    numbers = memory.empty(largest, np.dtype(np.uint64), what)
    assign(numbers, multipliers(largest))
    products = memory.empty(largest, np.dtype(np.uint64), what)
    sums = memory.zeros(max(sum(counts), 1), np.dtype(np.uint64), what)
    index = 0
    for each in words:
        for start in range(0, each.size, PIECE):
            piece = each[start : start + PIECE]
            out = products[: piece.size]
            np.multiply(piece, numbers[: piece.size], out=out)
            out.sum(keepdims=True, out=sums[index : index + 1])
            index += 1
    on_host = iter(sums.get().tolist())
    return [
        sum(next(on_host) * multiplier_of_piece(number) for number in range(count)) % _MODULUS
        for count in counts
    ]


def _words(array: Any) -> Any:
    """The bits of an array on a GPU as integers of at most 32 bits, in C's order."""
    flat = array.ravel()
    return flat if not flat.size else flat.view(np.dtype(f"u{min(flat.dtype.itemsize, 4)}"))


@functools.lru_cache(maxsize=1)
def multipliers(count: int) -> np.ndarray:
    """The first multipliers of words within a piece: odd, and without any order."""
    return _mixed(np.arange(count, dtype=np.uint64)) | np.uint64(1)


def multiplier_of_piece(number: int) -> int:
    """What the sum of a whole piece is multiplied by."""
    return int(_mixed(np.array([number + _MODULUS // 2], np.uint64))[0]) | 1


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers mixed by splitmix64, modulo 2**64."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
