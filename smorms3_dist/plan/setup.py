"""How many parameters of which dtype are trained by how many ranks, and how they lie there.

These are the formulas of `smorms3_dist.layout` in closed form, for billions of parameters and any
number of ranks. The tests compare them with the layouts themselves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from smorms3_dist.collectives.nccl import BFLOAT16
from smorms3_dist.layout import ALIGNMENT, BUCKET_BYTES

import numpy as np

GPU_BUCKET_BYTES = 1 << 26
"""As `smorms3_dist.device.memory.CudaMemory` has it, which needs Chainer."""

TRANSPORTS = ("nccl", "cuda-aware", "staged", "host")
"""How ranks communicate: over NCCL; over MPI from the memory of GPUs, or through host memory; over
MPI on CPUs."""

STATES = {
    "SMORMS3": 3,
    "SGD": 0,
    "MomentumSGD": 1,
    "CorrectedMomentumSGD": 1,
    "NesterovAG": 1,
    "Adam": 2,
    "AdamW": 2,
    "AMSGrad": 3,
    "AdaBound": 2,
    "AMSBound": 3,
    "MSVAG": 2,
    "AdaGrad": 1,
    "AdaDelta": 2,
    "RMSprop": 1,
    "RMSpropGraves": 3,
}
"""How many arrays like the parameter the rules of Chainer's optimizers keep."""

_SENT = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}


class Group:
    """The parameters of one dtype.

    Args:
        dtype: Their dtype.
        sizes: Their numbers of elements, in the order of their names.

    Attributes:
        dtype: Their dtype.
        elements: How many elements they have together.
        largest: How many the largest has.
        end: Where the last one ends in the flat buffer, in elements: each is aligned.
    """

    def __init__(self, dtype: np.dtype, sizes: Iterable[int]) -> None:
        self.dtype = dtype
        self._sizes = np.array(list(sizes), np.int64)
        unit = ALIGNMENT // dtype.itemsize
        ends = np.cumsum(-(-self._sizes // unit) * unit)
        self._offsets = np.append(0, ends[:-1])
        self._before = np.append(0, np.cumsum(self._sizes)[:-1])
        self.elements = int(self._sizes.sum())
        self.largest = int(self._sizes.max())
        self.end = int(ends[-1])

    def elements_before(self, places: np.ndarray) -> np.ndarray:
        """How many elements lie before places in the flat buffer, gaps not counted."""
        slots = np.searchsorted(self._offsets, places, side="right") - 1
        return self._before[slots] + np.minimum(places - self._offsets[slots], self._sizes[slots])


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model, and how it is to be trained.

    Attributes:
        groups: Its parameters, one group a dtype.
        ranks: World size.
        optimizer: A name in `STATES`.
        transport: One of `TRANSPORTS`.
        fp32_update: Whether float16 parameters have fp32 masters.
        replicated: Whether every rank receives the whole mean gradients.
        hooks: Whether hooks or dynamic loss scaling see the mean gradient of the shard.
        communication_dtype: What gradients are sent as over NCCL: ``float16``, ``bfloat16``, or
            ``None`` for their own dtype.
    """

    groups: tuple[Group, ...]
    ranks: int
    optimizer: str = "SMORMS3"
    transport: str = "nccl"
    fp32_update: bool = False
    replicated: bool = False
    hooks: bool = False
    communication_dtype: str | None = None

    @property
    def on_host(self) -> bool:
        """Whether it is trained on CPUs, where shards are laid out without gaps."""
        return self.transport == "host"

    @property
    def states(self) -> int:
        """How many states a parameter has."""
        return STATES[self.optimizer]

    def has_masters(self, group: Group) -> bool:
        """Whether the parameters of a group have fp32 masters."""
        return self.fp32_update and group.dtype == np.float16

    def state_itemsize(self, group: Group) -> int:
        """Bytes of an element of a state."""
        return 4 if self.has_masters(group) else group.dtype.itemsize

    def sent_dtype(self, group: Group) -> np.dtype:
        """What the gradients of a group are sent as."""
        dtype = self.communication_dtype
        return group.dtype if dtype is None else _SENT[dtype]

    def flat_size(self, group: Group) -> int:
        """Elements of a group's flat buffer."""
        whole = ALIGNMENT // group.dtype.itemsize * self.ranks
        return -(-group.end // whole) * whole

    def bucket_size(self, group: Group) -> int:
        """Elements of a group's largest bucket."""
        whole = ALIGNMENT // group.dtype.itemsize * self.ranks
        limit = BUCKET_BYTES if self.on_host else GPU_BUCKET_BYTES
        size = max(limit // group.dtype.itemsize // whole, 1) * whole
        return min(size, self.flat_size(group))

    def buckets(self, group: Group) -> int:
        """The number of a group's buckets."""
        size = self.bucket_size(group)
        return -(-self.flat_size(group) // size) if size else 0

    def shard_sizes(self, group: Group) -> np.ndarray:
        """Elements of the states of a group, by rank."""
        return _shard_sizes(self.ranks, self.on_host, group)


@functools.lru_cache(maxsize=64)
def _shard_sizes(ranks: int, dense: bool, group: Group) -> np.ndarray:
    setup = Setup((group,), ranks, transport="host" if dense else "nccl")
    flat, bucket = setup.flat_size(group), setup.bucket_size(group)
    if not dense:
        return np.full(ranks, flat // ranks)
    sizes = np.zeros(ranks, np.int64)
    for start in range(0, flat, max(bucket, 1)):
        part = (min(start + bucket, flat) - start) // ranks
        sizes += np.diff(group.elements_before(start + part * np.arange(ranks + 1)))
    return sizes
