"""The order of a step: gradients, reduction, hooks, update of the own shard, gathering.

`ShardedOptimizer` wraps a Chainer optimizer as ChainerMN's multi-node optimizer does, and takes its
place. What happens in a step, and when, is Chainer's and ChainerMN's; that each rank keeps only its
shard of the states is what differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from smorms3_dist import kernels
from smorms3_dist.buffers import FlatBuffers
from smorms3_dist.collectives import connect
from smorms3_dist.collectives.base import Collectives, Mean
from smorms3_dist.layout import FlatLayout
from smorms3_dist.model import ModelView, agree_on_layout
from smorms3_dist.update import ShardUpdate, check_rule, is_smorms3, move_states

import chainer

_logger = logging.getLogger(__name__)

_MODEL_CHANGED = 1
_WHOLE_GRADIENTS = 2

GRADIENT_MODES = ("auto", "replicated", "sharded")
"""What ``gradients`` may be."""


def create_multi_node_optimizer(
    actual_optimizer: chainer.GradientMethod,
    communicator: Any,
    double_buffering: bool = False,
    zero_fill: bool = True,
    *,
    gradients: str = "auto",
) -> ShardedOptimizer:
    """Makes a multi-node optimizer that keeps and updates 1/N of its states on each rank.

    It takes the place of ``chainermn.create_multi_node_optimizer``: the first four arguments are
    that function's.

    Args:
        actual_optimizer: A ``chainer.optimizers.SMORMS3``, set up or not. States that its rules
            have are taken over at the first update: they must be the same on all ranks.
        communicator: A ChainerMN communicator, another object with its interface, or an mpi4py
            communicator.
        double_buffering: Not supported; must be false.
        zero_fill: Accepted for compatibility. Parameters that were not used on a rank count as zero
            gradients there, whatever it says: Chainer fills them with zeros before the update in
            any case.
        gradients: ``'sharded'`` reduce-scatters gradients, so that a rank sees the mean of its own
            shard only and ``param.grad`` is ``None`` after a step. ``'replicated'`` gives every
            rank the whole mean gradients before hooks run. ``'auto'`` takes ``'sharded'`` unless a
            hook or dynamic loss scaling needs whole gradients. Parameters come out the same.

    Returns:
        The optimizer, to be used where the actual one would be.

    Raises:
        TypeError: If the optimizer is not a SMORMS3 or the communicator is none.
        ValueError: If ``gradients`` is none of the three, or double buffering is asked for.
        RuntimeError: If a launcher started several processes that MPI does not know of each other.
    """
    if double_buffering:
        raise ValueError(
            "double_buffering=True is not supported: it applies gradients one step late. Leave it"
            " out; the sharded step sends each gradient once and needs no second copy of the "
            "model"
        )
    if gradients not in GRADIENT_MODES:
        raise ValueError(f"gradients must be one of {', '.join(GRADIENT_MODES)}, not {gradients!r}")
    if hasattr(actual_optimizer, "actual_optimizer"):
        raise TypeError(
            f"{type(actual_optimizer).__name__} is a multi-node optimizer already; pass the "
            "Chainer optimizer that it wraps (its attribute actual_optimizer)"
        )
    if not isinstance(actual_optimizer, chainer.GradientMethod) or not is_smorms3(
        actual_optimizer.create_update_rule()
    ):
        raise TypeError(
            f"{type(actual_optimizer).__name__} cannot be sharded; pass a "
            "chainer.optimizers.SMORMS3, or use chainermn.create_multi_node_optimizer for this "
            "optimizer"
        )
    return ShardedOptimizer(
        actual_optimizer, communicator, connect(communicator), zero_fill, gradients
    )


class ShardedOptimizer:
    """A multi-node optimizer that keeps 1/N of the optimizer's states on each rank.

    Make it with `create_multi_node_optimizer`. Attributes that it does not have itself are those of
    the wrapped optimizer, to read and to write: ``t``, ``epoch``, ``lr``, ``eps``, ``target``,
    ``add_hook`` and so on.

    Attributes:
        actual_optimizer: The wrapped Chainer optimizer, which hooks receive.
        communicator: What the user gave as communicator.
        zero_fill: What the user gave as ``zero_fill``.
        collectives: The collectives in use; ``collectives.bytes_sent`` counts what this rank has
            sent.
        gradients: What the user gave as ``gradients``.
        gradient_mode: ``'sharded'`` or ``'replicated'``, as in the last step; ``None`` before the
            first.
        layout: The layout of the model over the ranks; ``None`` before the first update.
    """

    _OWN = frozenset(
        {
            "actual_optimizer",
            "communicator",
            "zero_fill",
            "collectives",
            "gradients",
            "gradient_mode",
            "layout",
            "_model",
            "_updates",
            "_said",
        }
    )

    actual_optimizer: chainer.GradientMethod
    communicator: Any
    zero_fill: bool
    collectives: Collectives
    gradients: str
    gradient_mode: str | None
    layout: FlatLayout | None
    _model: ModelView | None
    _updates: list[ShardUpdate]
    _said: set[str]

    def __init__(
        self,
        actual_optimizer: chainer.GradientMethod,
        communicator: Any,
        collectives: Collectives,
        zero_fill: bool,
        gradients: str,
    ) -> None:
        self.actual_optimizer = actual_optimizer
        self.communicator = communicator
        self.zero_fill = zero_fill
        self.collectives = collectives
        self.gradients = gradients
        self.gradient_mode = None
        self.layout = None
        self._model = None
        self._updates = []
        self._said = set()

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:
            raise AttributeError(f"{type(self).__name__} has no {name} yet")
        return getattr(self.actual_optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.actual_optimizer, name, value)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} of {type(self.actual_optimizer).__name__}, "
            f"rank {self.collectives.rank} of {self.collectives.size}>"
        )

    def setup(self, link: chainer.Link) -> ShardedOptimizer:
        """Sets the target link, resets ``t`` and ``epoch``, and gives parameters new update rules.

        Args:
            link: The model. Its parameters' states start afresh.

        Returns:
            This optimizer.
        """
        self.actual_optimizer.setup(link)
        return self

    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """Runs one step on all ranks together.

        The first call, and the first after the model has changed (a parameter was initialized,
        added, replaced or removed, on any rank), broadcasts the parameters of rank 0 instead and
        discards the gradients, as ChainerMN does: ``t`` is the number of calls less one.

        Args:
            lossfun: Returns the loss, given ``args`` and ``kwds``; gradients are then computed
                here. Without it, the gradients that the parameters hold are used.
            *args: For ``lossfun``.
            **kwds: For ``lossfun``.

        Raises:
            RuntimeError: Before ``setup``; or if ranks have different models; or if
                ``gradients='sharded'`` was asked for and something needs whole gradients.
            TypeError: If a parameter cannot be sharded: its update rule, its dtype or its device.
        """
        if self.actual_optimizer.target is None:
            raise RuntimeError("the optimizer has no target; call setup(link) before update()")
        if lossfun is not None:
            self._compute_gradients(lossfun, *args, **kwds)
        model = ModelView(self.actual_optimizer.target)
        for name, param in model.initialized.items():
            check_rule(name, param.update_rule, param.dtype)
        flags = self.collectives.all_reduce_or(self._flags(model))
        if flags & _MODEL_CHANGED:
            self._lay_out(model)
            return
        for update in self._updates:
            update.buffers.adopt()
        if flags & _WHOLE_GRADIENTS:
            self.gradient_mode = "replicated"
            self._replicated_step(model)
        else:
            self.gradient_mode = "sharded"
            self._sharded_step(model)

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds.

        Summed over the ranks: 3 x itemsize x parameters. Zero before the first update.
        """
        return sum(update.nbytes for update in self._updates)

    def serialize(self, serializer: Any) -> None:
        """Refuses: this rank holds 1/N of the states, and a snapshot of these would lose the rest.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "sharded optimizer states cannot be saved or loaded yet: each rank holds only a part "
            "of them. Save the model by itself, for example chainer.serializers.save_npz(path, "
            "model) on rank 0, and leave the optimizer and trainer snapshots out"
        )

    # Before the step

    def _compute_gradients(self, lossfun: Callable[..., Any], *args: Any, **kwds: Any) -> None:
        optimizer = self.actual_optimizer
        loss = lossfun(*args, **kwds)
        # After the forward pass, which may have created parameters that have to be cleared as well.
        if getattr(optimizer, "_use_cleargrads", True):
            optimizer.target.cleargrads()
        else:
            optimizer.target.zerograds()
        loss.backward(loss_scale=optimizer._loss_scale)

    def _flags(self, model: ModelView) -> int:
        """What this rank knows and all must act upon together."""
        flags = 0
        if self._model is None or not model.same_structure(self._model):
            flags |= _MODEL_CHANGED
        reason = self._why_whole_gradients(model)
        if self.gradients == "replicated":
            flags |= _WHOLE_GRADIENTS
        elif reason is not None:
            if self.gradients == "sharded":
                raise RuntimeError(
                    f"gradients='sharded' was asked for, but {reason} needs whole gradients; "
                    "use gradients='auto' or 'replicated'"
                )
            self._say(logging.WARNING, f"every rank receives whole gradients: {reason} needs them")
            flags |= _WHOLE_GRADIENTS
        else:
            self._say(logging.INFO, "gradients are sharded: nothing needs them whole")
        return flags

    def _why_whole_gradients(self, model: ModelView) -> str | None:
        optimizer = self.actual_optimizer
        for name in _hook_names(optimizer._hookable):
            return f"the hook {name!r}"
        if optimizer._loss_scaling_is_dynamic:
            return "dynamic loss scaling"
        for path, param in model.initialized.items():
            if param.update_rule is not None:
                for name in _hook_names(param.update_rule._hookable):
                    return f"the hook {name!r} of the update rule of {path}"
        return None

    def _say(self, level: int, message: str) -> None:
        if self.collectives.rank == 0 and message not in self._said:
            _logger.log(level, message)
            self._said.add(message)

    def _lay_out(self, model: ModelView) -> None:
        """Makes layout, buffers and states for the model, and broadcasts rank 0's parameters."""
        layout = agree_on_layout(model, self.collectives)
        rank = self.collectives.rank
        updates = []
        for group in layout.groups:
            params = [model.initialized[slot.name] for slot in group.slots]
            buffers = FlatBuffers(group, params)
            self.collectives.broadcast(buffers.flat)
            kernel = kernels.select(group.dtype, rank)
            updates.append(ShardUpdate(buffers, group.shards[rank], kernel))
        move_states(self._updates, updates, self.collectives)
        self.layout, self._updates, self._model = layout, updates, model

    # The step

    def _sharded_step(self, model: ModelView) -> None:
        optimizer = self.actual_optimizer
        optimizer.t += 1
        self._start_updates(model, model.loss_scale())
        for update in self._updates:
            buffers = update.buffers
            with buffers.gradients():
                self.collectives.reduce_scatter(
                    buffers.group, buffers.read_piece, update.update_piece
                )
            for param in buffers.params:
                # What is left there is this rank's own gradient, not the mean.
                param.grad = None
            self.collectives.all_gather(buffers.flat, buffers.group.buckets)
        optimizer.update_loss_scale()

    def _replicated_step(self, model: ModelView) -> None:
        optimizer = self.actual_optimizer
        for update in self._updates:
            buffers = update.buffers
            with buffers.gradients():
                self.collectives.reduce_scatter(
                    buffers.group, buffers.read_piece, buffers.store_piece
                )
            self.collectives.all_gather(buffers.flat_grad, buffers.group.buckets)
            buffers.expose_flat_grad()
        optimizer.reallocate_cleared_grads()
        optimizer.check_nan_in_grads()
        optimizer.call_hooks("pre")
        optimizer.t += 1
        if optimizer.is_safe_to_update():
            self._update_from_whole_gradients(model)
        optimizer.reallocate_cleared_grads()
        optimizer.call_hooks("post")
        optimizer.update_loss_scale()

    def _update_from_whole_gradients(self, model: ModelView) -> None:
        scale = model.loss_scale()
        self._start_updates(model, None)
        for param in model.enabled():
            if scale is not None:
                # In place, as Chainer does: hooks that come later see the true gradient.
                param.grad /= scale
            param.update_rule._hookable.call_hooks("pre", args=(param.update_rule, param))
        for update in self._updates:
            buffers = update.buffers
            # Hooks may have replaced arrays.
            buffers.adopt()
            with buffers.gradients():
                for segment in update.shard.segments:
                    grad = buffers.gradient(segment)
                    if grad is not None:
                        update.update((segment,), Mean(grad))
            self.collectives.all_gather(buffers.flat, buffers.group.buckets)
        for param in model.enabled():
            param.update_rule._hookable.call_hooks("post", args=(param.update_rule, param))

    def _start_updates(self, model: ModelView, loss_scale: float | None) -> None:
        for update in self._updates:
            update.start_step(model.times, loss_scale)
        for param in model.uninitialized.values():
            if param.update_rule is not None and param.update_rule.enabled:
                param.update_rule.t += model.times[id(param)]


def _hook_names(hookable: Any) -> Iterator[str]:
    if hookable is not None:
        yield from hookable._pre_update_hooks
        yield from hookable._post_update_hooks
