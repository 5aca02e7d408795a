"""A model laid out over the ranks: all its groups.

What a step does with all groups alike is here; in which order, and when hooks run in between, is
the optimizer's business.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.links import gradients_of
from smorms3_dist.chainer_internals.loss_scale import note_loss_scale
from smorms3_dist.collectives.base import Collectives, Consume, DeviceCollectives, Gradients
from smorms3_dist.collectives.narrowing import NarrowGradients, all_gather_narrow
from smorms3_dist.collectives.sharing import (
    CannotShareError,
    broadcast,
    gather,
    share_on_hosts,
)
from smorms3_dist.device.malloc import keep_freed_memory
from smorms3_dist.device.memory import Memory
from smorms3_dist.hooks.parts import Part
from smorms3_dist.hooks.views import WholeParameter
from smorms3_dist.kernels.cuda import KernelError
from smorms3_dist.kernels.narrow import narrower
from smorms3_dist.layout import Bucket
from smorms3_dist.phases import Phase
from smorms3_dist.sharding.buffers import FlatBuffers, InFlight, count_owners
from smorms3_dist.sharding.fingerprints import sample, sample_again
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.kept_gradient import KeptGradient
from smorms3_dist.sharding.model import ModelView, agree_on_layout
from smorms3_dist.sharding.moving import move_states
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.sharding.staged_gradient import StagedGradient, names_not_finite
from smorms3_dist.sharding.whole_group import WholeGroup

import chainer
import numpy as np

AnyGroup = ShardedGroup | WholeGroup


class GradientsAre(enum.Enum):
    """Where the mean gradients of the last update are."""

    NOT_REDUCED = "with each rank, as it computed them: the update only broadcast parameters"
    NOT_KEPT = "used up by the update"
    IN_FLIGHT = "not there yet: the update applied none"
    ON_OWNERS = "each shard's with its owner"
    WHOLE = "whole on every rank, in param.grad"


class NormAndNonfinite(NamedTuple):
    """What is to be known of gradients before an update, on a GPU: float64 there.

    Attributes:
        both: The two numbers side by side, to be fetched at once.
        norm_squared: The sum of squares over all ranks and groups.
        nonfinite: The number of elements that are infinite or nan.
    """

    both: Any
    norm_squared: Any
    nonfinite: Any


class ShardedModel:
    """The groups of a model, laid out. Made by all ranks together.

    Parameters become views of flat buffers; those that are initialized on other ranks are
    initialized here, too. Where ``from_rank_0`` says so, all take those of that rank. States of the
    laid-out model that this takes the place of (``before``) go over. Gradients in host memory are
    sent in ``communication_dtype``. With ``late``, each step applies the gradients in flight.
    Buckets have ``bucket_bytes`` at most, by default as many as the memory wants. With ``share``,
    the ranks of a host have one array of parameters, if they can.

    Attributes:
        model: The model, as at the last update.
        is_whole: Whether all parameters of the model had arrays when it was last laid out, or was
            found to be so already.
        layout: Which element lies where, over all ranks.
        rank: The rank whose shards these are.
        groups: The parameters that share flat buffers, group by group.
        staged: The gradients of the shards, by index of the group, while there is memory for them;
            empty otherwise.
        kept: The gradients of the shards, while they wait for the update; for the next step the
            memory that they need besides that of gradients.
        gradients_are: Where the mean gradients of the last update are.
        in_flight: The parameters that are being gathered, if there are any.
        obstacle: Why the ranks of a host do not share parameters, in words, if they were to.
        is_to_share: Whether it is a copy, which has parameters of its own, of one that shares them.

    Raises:
        RuntimeError: If the ranks' models differ, naming the first parameter and the ranks.
        MemoryError: If a rank has not enough memory; on all ranks, naming it. Parameters and the
            states of their rules are then as they were.
        KernelError: Likewise, if a rank cannot compile the kernels for its GPU.
    """

    def __init__(
        self,
        model: ModelView,
        memory: Memory,
        collectives: Collectives,
        from_rank_0: bool,
        before: ShardedModel | None = None,
        communication_dtype: str | None = None,
        late: bool = False,
        bucket_bytes: int | None = None,
        share: bool = False,
    ) -> None:
        self.layout = agree_on_layout(model, collectives, memory, bucket_bytes)
        self.rank = collectives.rank
        self.model = model
        self.is_whole = not model.uninitialized
        self._communication_dtype = communication_dtype
        self.groups: list[AnyGroup] = []
        self.staged: dict[int, StagedGradient] = {}
        self.kept: list[KeptGradient] = []
        self.gradients_are = GradientsAre.NOT_REDUCED
        self.in_flight: InFlight | None = None
        # Of each group in host memory, by its index.
        self._samples: dict[int, np.ndarray] = {}
        # Whether the arrays that the model has noted are views of the flat buffers.
        self._noted_views = False
        self.obstacle: str | None = None
        self.is_to_share = False
        shared = self._share(collectives) if share else []
        self._allocate(memory, collectives, late, shared)
        if shared:
            self._move_in(collectives)
        for group in self.groups:
            if from_rank_0:
                broadcast(collectives, group.buffers.flat, self.shares)
            if isinstance(group, ShardedGroup):
                group.fill_masters()
                group.adopt_whole_states()
        if before is not None:
            move_states(before.groups, self.groups, collectives)
            for group in before.groups if before.shares else ():
                group.buffers.move_out()
        if self.shares:
            collectives.meet_on_host()
        if memory.launcher is None:
            # Not before: what the flat buffers have taken the place of goes back to the system.
            keep_freed_memory()

    def _share(self, collectives: Collectives) -> list[np.ndarray]:
        """Makes flat buffers that the ranks of a host share; none, if they cannot. Collective."""
        if collectives.size == 1 or collectives.hosts.have_one_rank_each:
            return []
        sizes = [group.size * group.dtype.itemsize for group in self.layout.groups]
        try:
            return share_on_hosts(collectives, sizes)
        except CannotShareError as error:
            self.obstacle = str(error)
            return []

    def _allocate(
        self, memory: Memory, collectives: Collectives, late: bool, shared: Sequence[np.ndarray]
    ) -> None:
        """Makes the groups; on all ranks, or on none."""
        lack: tuple[type[Exception], str] | None = None
        flats: list[np.ndarray | None] = [None] * len(self.layout.groups)
        flats[: len(shared)] = shared
        try:
            for layout, flat in zip(self.layout.groups, flats, strict=True):
                params = [self.model.initialized[slot.name] for slot in layout.slots]
                buffers = FlatBuffers(layout, params, memory, flat)
                plan = self.model.plans[layout.slots[0].name]
                if plan.kind is Kind.WHOLE:
                    self.groups.append(WholeGroup(buffers, plan))
                else:
                    shard = layout.shards[collectives.rank]
                    group = ShardedGroup(buffers, shard, plan, late)
                    group.load_kernels()
                    self.groups.append(group)
                collectives.prepare(layout)
        except (MemoryError, KernelError) as error:
            # Its words alone: the error would keep what was allocated before it.
            lack = type(error), str(error)
        for rank, lacking in enumerate(collectives.all_gather_object(lack)):
            if lacking is not None:
                kind, message = lacking
                raise kind(f"rank {rank}: {message}")

    def __getstate__(self) -> dict[str, object]:
        # Staged gradients are views into buffers, and of a step that is over.
        on_owners = self.gradients_are is GradientsAre.ON_OWNERS
        left = GradientsAre.NOT_KEPT if on_owners else self.gradients_are
        self.finish_gather()
        own: dict[str, object] = {"staged": {}, "kept": [], "gradients_are": left}
        own["in_flight"] = None
        return {**self.__dict__, **own, "is_to_share": self.shares or self.is_to_share}

    @property
    def sharded_groups(self) -> Iterator[ShardedGroup]:
        """The groups whose states are sharded."""
        return (group for group in self.groups if isinstance(group, ShardedGroup))

    @property
    def whole_groups(self) -> Iterator[WholeGroup]:
        """The groups whose states every rank has."""
        return (group for group in self.groups if isinstance(group, WholeGroup))

    @property
    def shares(self) -> bool:
        """Whether the ranks of a host share parameters."""
        return self.groups[0].buffers.is_shared

    @property
    def were_replaced(self) -> bool:
        """Whether somebody has given another array to a parameter."""
        return any(group.buffers.were_replaced for group in self.groups)

    def move_in(self, collectives: Collectives) -> None:
        """Takes over arrays that somebody has given to parameters that ranks share. Collective.

        They have the same values on all ranks of a host, or get other ones before long: the first
        of these ranks writes its own.

        Raises:
            RuntimeError: If it was another optimizer, which updates them, too.
        """
        for group in self.groups:
            group.buffers.refuse_shared()
        self._move_in(collectives)

    def _move_in(self, collectives: Collectives) -> None:
        for group in self.groups:
            group.buffers.move_in(write=collectives.hosts.is_first)
        collectives.meet_on_host()

    @contextlib.contextmanager
    def lent(self, hooks: str) -> Iterator[None]:
        """Lets hooks see whole parameters, but not write to those that ranks share.

        Args:
            hooks: Which hooks, in words.

        Raises:
            RuntimeError: If one of them does; its write has changed nothing.
        """
        buffers = [group.buffers for group in self.groups] if self.shares else []
        try:
            for each in buffers:
                each.make_writeable(False)
            yield
            for each in buffers:
                each.adopt()
        except ValueError as error:
            if not buffers or "read-only" not in str(error):
                raise
            raise RuntimeError(
                f"one of the {hooks} writes to whole parameters, on every rank, but these are one "
                "array for all ranks of a host (share_parameters=True), which would be written to "
                "by each of them. Hooks run on shards, and may write there, if all of them treat "
                "elements by themselves (call_for_each_param and is_elementwise) and "
                "gradients='replicated' was not asked for; else leave share_parameters out"
            ) from error
        finally:
            for each in buffers:
                each.make_writeable(True)

    def adopt(self, model: ModelView | None = None) -> None:
        """Takes over the arrays that somebody has given to parameters.

        Args:
            model: The model as a step has just looked at it, if it is for one.

        Raises:
            RuntimeError: If it was another optimizer, which updates them, too.
        """
        self.finish_gather()
        if model is not None:
            # The same view says that parameters have the arrays that it has noted.
            if model is self.model and self._noted_views:
                return
            self.model = model
        self._noted_views = False
        replaced = [group.buffers for group in self.groups if group.buffers.were_replaced]
        for buffers in replaced:
            buffers.refuse_shared()
        for buffers in replaced:
            buffers.adopt()

    def note_values(self, seen: bool = True) -> None:
        """Remembers what parameters are after an update.

        Args:
            seen: Whether somebody may have replaced arrays since `adopt`.
        """
        if seen or not self._noted_views:
            self.model.note_arrays()
            self._noted_views = not seen
        self._samples = self._samples_now()

    def note_gathered(self, group: AnyGroup, bucket: Bucket) -> None:
        """Remembers what the parameters in a bucket are that has been gathered after that."""
        flat = group.buffers.flat_in_flight
        for index, sampled in self._samples.items():
            if self.groups[index] is group:
                sample_again(flat, bucket.start_f, bucket.stop_f, sampled)

    def was_written_to(self, model: ModelView) -> bool:
        """Whether somebody has written to parameters since `note_values`, as far as a few tell.

        Whatever replaces arrays, or all values, as loading does, is noticed; not a single element.
        GPUs would have to be waited for: there arrays that were replaced are noticed, and no more.
        """
        return not model.arrays_since(self.model) or any(
            index not in self._samples or now.tobytes() != self._samples[index].tobytes()
            for index, now in self._samples_now().items()
        )

    def _samples_now(self) -> dict[int, np.ndarray]:
        return {
            index: sample(group.buffers.flat)
            for index, group in enumerate(self.groups)
            if group.memory.launcher is None
        }

    def stage(self) -> dict[int, StagedGradient]:
        """Makes the gradients of the shards, where they are not there yet."""
        if not self.staged:
            self.staged = {
                index: StagedGradient(group)
                for index, group in enumerate(self.groups)
                if isinstance(group, ShardedGroup)
            }
        return self.staged

    def keep(self, collectives: Collectives) -> list[KeptGradient]:
        """Makes what keeps the gradients of the shards, if it is not there yet. Collective."""
        self.staged = {}
        if not self.kept:
            self.kept = [KeptGradient(group, collectives) for group in self.sharded_groups]
        params = self.model.initialized.values()
        # Parameters count twice: who gives one to itself as its gradient keeps it.
        flat = 2 * [group.buffers.flat for group in self.groups]
        owners = functools.cache(lambda: count_owners([*gradients_of(params), *flat]))
        for gradient in self.kept:
            gradient.prepare(owners)
        return self.kept

    def reduce(self, group: AnyGroup, consume: Consume, collectives: Collectives) -> None:
        """Averages the gradients of a group; each rank consumes its own shard. Collective."""
        with collectives.phases.during(Phase.REDUCE):
            group.reduce(self.as_sent(group), collectives, consume)

    def sends_as_they_are(self, group: AnyGroup) -> bool:
        """Whether gradients of a group are sent in their own dtype."""
        return narrower(self._communication_dtype, group.dtype) is None

    def as_sent(self, group: AnyGroup, gradients: Gradients | None = None) -> Gradients:
        """This rank's gradients of a group, in the dtype in which they are sent.

        ``gradients`` are those that are sent, if not what parameters have now.
        """
        own = group.buffers if gradients is None else gradients
        sent = narrower(self._communication_dtype, group.dtype)
        # GPUs send in another dtype by themselves.
        if sent is None or group.memory.launcher is not None:
            return own
        return NarrowGradients(own, sent)

    def reduce_whole(self, group: AnyGroup, collectives: Collectives) -> None:
        """Gives every rank the whole mean gradients of a group. Collective."""
        with collectives.phases.during(Phase.REDUCE):
            self.reduce(group, group.buffers.store_piece, collectives)
            _gather_whole_gradients(group.buffers, collectives)

    def gather_gradients(self, collectives: Collectives) -> None:
        """Gives every rank the whole mean gradients of the last update. Collective."""
        if self.gradients_are is GradientsAre.NOT_REDUCED:
            for group in self.groups:
                with collectives.phases.during(Phase.REDUCE):
                    store = group.buffers.store_piece
                    group.reduce_own(self.as_sent(group), collectives, store)
                    _gather_whole_gradients(group.buffers, collectives)
                for param in group.buffers.params:
                    if self.model.loss_scale is not None:
                        param.grad /= self.model.loss_scale
        else:
            for gradient in self.staged.values():
                gradient.show_in_parameters()
                _gather_whole_gradients(gradient.group.buffers, collectives)
        self.gradients_are = GradientsAre.WHOLE

    def finish_gather(self) -> None:
        """Waits until all parameters are there, where they are gathered beside the training.

        Raises:
            RuntimeError: If that has failed, naming the rank, and why.
        """
        if self.in_flight is not None:
            self.in_flight.finish()

    def gather(self, group: AnyGroup, collectives: Collectives, adopt: bool = True) -> None:
        """Gives every rank the parameters of a group as their owners have them. Collective.

        Where they are sent in a narrow dtype, owners have rounded ones as well then.

        Args:
            group: The group.
            collectives: The ranks.
            adopt: Whether somebody may have replaced arrays in this step.
        """
        if adopt:
            group.buffers.adopt()
        flat, buckets = group.buffers.flat, group.layout.buckets
        with collectives.phases.during(Phase.GATHER):
            if isinstance(group, ShardedGroup) and group.seen_as is not None:
                all_gather_narrow(collectives, flat, buckets, group.seen_as, self.shares)
            else:
                gather(collectives, flat, buckets, self.shares)

    def gather_exactly(self, collectives: Collectives) -> None:
        """Gives every rank all parameters as their owners have them, unrounded. Collective."""
        for group in self.groups:
            group.buffers.adopt()
            gather(collectives, group.buffers.flat, group.layout.buckets, self.shares)

    def flats_of(self, model: ModelView) -> list[Any] | None:
        """The flat buffers, if they hold all initialized parameters of a model as it is now."""
        if not model.same_structure(self.model) or self.were_replaced:
            return None
        return [group.buffers.flat for group in self.groups]

    def norm_and_nonfinite(self, collectives: Collectives) -> NormAndNonfinite:
        """Finds the norm of the staged gradients, and what is not finite, on a GPU. Collective."""
        assert isinstance(collectives, DeviceCollectives)
        parts = (gradient.norm_and_nonfinite() for gradient in self.staged.values())
        total = functools.reduce(operator.add, parts)
        collectives.all_reduce_sum(total)
        return NormAndNonfinite(total, total[:1], total[1:])

    def not_finite(self) -> Iterator[str]:
        """Names of the parameters of whose gradients what lies here is infinite or nan."""
        for index, group in enumerate(self.groups):
            if index in self.staged:
                yield from self.staged[index].not_finite()
            elif isinstance(group, ShardedGroup):
                grads = (group.buffers.flat_grad[s.range_f] for s in group.shard.segments)
                yield from names_not_finite(group.shard, grads)
            else:
                for slot, param in group.parameters():
                    if not np.isfinite(param.grad).all():
                        yield slot.name

    def parts(self, loss_scale: float | None) -> list[Part]:
        """What this rank holds of each parameter, in the order in which Chainer calls hooks."""
        parts = {}
        for gradient in self.staged.values():
            for part in gradient.parts(loss_scale):
                parts[part.name] = part
                if not part.owners:
                    parts[part.name] = self._without_elements(part.name)
        for group in self.whole_groups:
            for slot, param in group.parameters():
                note_loss_scale(param, loss_scale)
                parts[slot.name] = _whole(slot.name, param)
        for name, param in self.model.uninitialized.items():
            parts[name] = _whole(name, param)
        return [parts[name] for name in self.model.names_in_order]

    def kept_parts(self) -> list[Part]:
        """What this rank keeps of each parameter, for norms, in the order of Chainer's sums."""
        parts = {part.name: part for gradient in self.kept for part in gradient.parts()}
        return [
            parts[name] if parts[name].owners else self._without_elements(name)
            for name in self.model.names_in_order
            if name in parts
        ]

    def _without_elements(self, name: str) -> Part:
        """A parameter that nobody owns, but whose dtype counts in norms."""
        param = self.model.initialized[name]
        param.grad = np.zeros_like(param.array)
        return _whole(name, param)

    def in_order_of_hooks(self, parts: Iterable[Part]) -> list[Part]:
        """Sorts parts of different parameters into the order in which Chainer calls hooks."""
        by_name = {part.name: part for part in parts}
        return [
            by_name[name] for name in dict.fromkeys(self.model.names_in_order) if name in by_name
        ]


def _gather_whole_gradients(buffers: FlatBuffers, collectives: Collectives) -> None:
    collectives.all_gather(buffers.flat_grad, buffers.layout.buckets)
    buffers.expose_flat_grad()


def _whole(name: str, param: chainer.Parameter) -> Part:
    itself = [WholeParameter(param)]
    return Part(name, param.update_rule, itself, itself, (), None)
