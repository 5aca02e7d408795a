"""A model, and how it is to be trained."""

from __future__ import annotations

import dataclasses
import functools

from smorms3_dist.kernels.narrow import SENT_AS, narrower
from smorms3_dist.layout import (
    BUCKET_BYTES,
    GPU_BUCKET_BYTES,
    FlatLayout,
    GroupLayout,
    ParameterSpec,
    gpu_bucket_bytes,
)

import numpy as np

TRANSPORTS = ("nccl", "cuda-aware", "staged", "host")
"""How ranks communicate: over NCCL; over MPI from the memory of GPUs, or through host memory; over
MPI on CPUs."""

# fmt: off
STATES = {
    "SMORMS3": 3, "SGD": 0, "MomentumSGD": 1, "CorrectedMomentumSGD": 1, "NesterovAG": 1, "Adam": 2,
    "AdamW": 2, "AMSGrad": 3, "AdaBound": 2, "AMSBound": 3, "MSVAG": 2, "AdaGrad": 1, "AdaDelta": 2,
    "RMSprop": 1, "RMSpropGraves": 3,
}
# fmt: on
"""How many arrays like the parameter the rules of Chainer's optimizers keep."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model, and how it is to be trained: as the options of the command line say.

    `transport` is one of `TRANSPORTS`, `optimizer` a name in `STATES`, and `communication_dtype`
    ``None`` where gradients are sent as they are, as `gather_dtype` is of parameters.
    """

    specs: tuple[ParameterSpec, ...]
    ranks: int
    ranks_per_node: int = 8
    transport: str = "nccl"
    optimizer: str = "SMORMS3"
    fp32_update: bool = False
    gradients: str = "sharded"
    hooks: bool = False
    communication_dtype: str | None = None
    gather_dtype: str | None = None
    double_buffering: bool = False
    share_parameters: bool = False

    @functools.cached_property
    def groups(self) -> tuple[GroupLayout, ...]:
        """How the parameters are laid out, one group a dtype."""
        bucket_bytes = gpu_bucket_bytes(self.ranks, GPU_BUCKET_BYTES)
        if self.on_host:
            bucket_bytes = BUCKET_BYTES
        return FlatLayout(self.specs, self.ranks, bucket_bytes, dense=self.on_host).groups

    @property
    def on_host(self) -> bool:
        """Whether it is trained on CPUs, where shards are laid out without gaps."""
        return self.transport == "host"

    @property
    def ranks_sharing(self) -> int:
        """How many ranks of a node share one array of parameters."""
        return min(self.ranks, self.ranks_per_node) if self.share_parameters else 1

    @property
    def replicated(self) -> bool:
        """Whether every rank receives the whole mean gradients."""
        return self.gradients == "replicated"

    def shard_sizes(self, group: GroupLayout) -> np.ndarray:
        """Elements of the states of a group, by rank."""
        if group.dense:
            return np.array([shard.size for shard in group.shards])
        return np.full(self.ranks, group.size // self.ranks)

    def has_fp32_masters(self, group: GroupLayout) -> bool:
        """Whether the parameters of a group are float16 with fp32 masters, as Chainer has them."""
        return self.fp32_update and group.dtype == np.float16

    def master_bytes(self, group: GroupLayout) -> int:
        """Bytes of the master of an element, of either kind; 0 if there are none."""
        if self.has_fp32_masters(group):
            return 4
        return 0 if self.gathered_dtype(group) == group.dtype else group.dtype.itemsize

    def state_bytes(self, group: GroupLayout) -> int:
        """Bytes that the states of an element take."""
        return STATES[self.optimizer] * (self.master_bytes(group) or group.dtype.itemsize)

    def sent_dtype(self, group: GroupLayout) -> np.dtype:
        """What the gradients of a group are sent as."""
        sent = self.communication_dtype
        if self.on_host:
            return narrower(sent, group.dtype) or group.dtype
        return group.dtype if sent is None else SENT_AS[sent]

    def gathered_dtype(self, group: GroupLayout) -> np.dtype:
        """What the parameters of a group are sent as."""
        return narrower(self.gather_dtype, group.dtype) or group.dtype


def elements(group: GroupLayout) -> int:
    """How many elements the parameters of a group have, gaps not counted."""
    return sum(slot.size for slot in group.slots)


def gradient_bytes(group: GroupLayout) -> int:
    """Bytes of the gradients of a group, as a backward pass makes them."""
    return elements(group) * group.dtype.itemsize
