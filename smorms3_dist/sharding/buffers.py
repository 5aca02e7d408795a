"""The flat arrays of a group: parameters as views of one buffer, gradients to read pieces from.

Parameters live in the flat buffer itself, so gathering the buffer updates the model and nothing is
unpacked. Gradients stay where backward put them, and are read from there; only what is not
contiguous is copied. Where whole mean gradients are wanted, they get a flat buffer as well.

The parameters' buffer may be one that all ranks of a host share. What a rank writes there, the
others see at once.
"""

from __future__ import annotations

import collections
import itertools
import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from smorms3_dist.chainer_internals.links import arrays_of, clear_gradients_of, gradients_of
from smorms3_dist.device.memory import PARAMETERS, Memory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.tables import PackedPart, PackTable
from smorms3_dist.layout import Bucket, GroupLayout, Piece, Segment, Slot

import chainer
import numpy as np
from chainer.backends import cuda

# All that are in use, by the memory of their flat buffer.
_everybodys: weakref.WeakValueDictionary[int, FlatBuffers] = weakref.WeakValueDictionary()


class InFlight(Protocol):
    """Parameters that are being gathered."""

    def finish(self) -> None:
        """Waits until all of them are there."""


class FlatBuffers:
    """The flat buffers of one group on this rank.

    Parameters move in as soon as it is made; but into a buffer that ranks share only by `move_in`.

    Args:
        layout: See below.
        params: See below.
        memory: See below.
        shared: What ``flat`` is to be, if the ranks of this host share it: bytes, all zeros.

    Attributes:
        layout: The layout of the group.
        params: The parameters, by slot; initialized. Their arrays become views of ``flat``, with
            the same values.
        memory: Allocates the buffers.
        flat_in_flight: The parameters' buffer, of ``layout.size`` elements, as it is even while
            they are being gathered.
        in_flight: What is being gathered there, if there is anything.
        is_shared: Whether the ranks of this host share it.
    """

    def __init__(
        self,
        layout: GroupLayout,
        params: Sequence[chainer.Parameter],
        memory: Memory,
        shared: np.ndarray | None = None,
    ) -> None:
        self.layout = layout
        self.params = tuple(params)
        self.memory = memory
        self.in_flight: InFlight | None = None
        self.is_shared = shared is not None
        self.flat_in_flight = (
            memory.zeros(
                layout.size,
                layout.dtype,
                f"the flat buffer of {layout.dtype} parameters",
                PARAMETERS,
            )
            if shared is None
            else shared.view(layout.dtype)
        )
        self._views = [memory.apart(_view(self.flat, slot)) for slot in layout.slots]
        self._flat_grad: Any = None
        self._packs: dict[Bucket, tuple[PackTable, list[int]]] = {}
        self._own = self._no_gradients()
        _everybodys[id(root_of(self.flat))] = self
        if not self.is_shared:
            self.move_in()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied view would be an array of its own. Copies share nothing.
        return FlatBuffers, (self.layout, self.params, self.memory)

    @property
    def flat(self) -> Any:
        """The parameters' buffer, of ``layout.size`` elements; waits until they are gathered."""
        if self.in_flight is not None:
            self.in_flight.finish()
        return self.flat_in_flight

    @property
    def views(self) -> Sequence[Any]:
        """The arrays of the parameters, in the flat buffer."""
        return self._views

    @property
    def dtype(self) -> np.dtype:
        """The dtype of parameters and gradients."""
        return self.layout.dtype

    def parameters(self) -> Iterator[tuple[Slot, chainer.Parameter]]:
        """The parameters, with their slots, in the order of the flat buffer."""
        return zip(self.layout.slots, self.params, strict=True)

    @property
    def were_replaced(self) -> bool:
        """Whether somebody has given another array to a parameter."""
        return not all(map(operator.is_, arrays_of(self.params), self._views))

    def refuse_shared(self) -> None:
        """Refuses parameters that another optimizer has taken over, and updates as well.

        Raises:
            RuntimeError: If there is one, naming it.
        """
        for view, (slot, param) in zip(self._views, self.parameters(), strict=True):
            if param.array is view or param.array is None:
                continue
            other = _everybodys.get(id(root_of(param.array)))
            if other is not None and other is not self and any(p is param for p in other.params):
                raise RuntimeError(
                    f"parameter {slot.name} is updated by two optimizers, which would each keep "
                    "states of their own for it. Use one optimizer for the whole model, or set the "
                    "optimizers up with links that have no parameter in common"
                )

    def adopt(self) -> None:
        """Takes over, with their values, the arrays that somebody has given to parameters.

        Raises:
            RuntimeError: If ranks share the buffer: others may write to their parts by now.
        """
        if not self.were_replaced:
            return
        if self.is_shared:
            pairs = zip(self._views, self.parameters(), strict=True)
            name = next(slot.name for view, (slot, p) in pairs if p.array is not view)
            raise RuntimeError(
                f"parameter {name} was given another array in the middle of an update, by a hook "
                "or a thread, but its elements are those of all ranks of the host "
                "(share_parameters=True). Do so between updates, or leave share_parameters out"
            )
        self.move_in()

    def move_in(self, write: bool = True) -> None:
        """Makes parameters views of the buffer.

        Args:
            write: Whether their values are written to it; else another rank writes its own.
        """
        for view, param, array in zip(
            self._views, self.params, arrays_of(self.params), strict=True
        ):
            if array is not view:
                if write:
                    view[...] = array
                _give(param, view)

    def move_out(self) -> None:
        """Gives parameters that are still here arrays of their own."""
        for view, param in zip(self._views, self.params, strict=True):
            if param.array is view:
                _give(param, view.copy())

    def make_writeable(self, writeable: bool) -> None:
        """Makes the parameters' arrays such as can be written to, or not."""
        for view in self._views:
            view.flags.writeable = writeable

    @property
    def flat_grad(self) -> np.ndarray:
        """The buffer of whole mean gradients, like ``flat``; made when first asked for."""
        if self._flat_grad is None:
            self._flat_grad = self.memory.zeros(
                self.layout.size, self.layout.dtype, f"whole mean gradients in {self.layout.dtype}"
            )
        return self._flat_grad

    def expose_flat_grad(self) -> None:
        """Makes every parameter's ``grad`` a view of ``flat_grad``."""
        for slot, param in self.parameters():
            param.grad = _view(self.flat_grad, slot)

    def clear_gradients(self) -> None:
        """Leaves every parameter without a gradient."""
        clear_gradients_of(self.params)

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Takes the parameters' gradients as they are now, for `read_piece` and `gradient`.

        A gradient of ``None`` reads as zeros. One that is not contiguous is copied, here and once.
        """
        grads = gradients_of(self.params)
        on_host = self.layout.dense and self.memory.launcher is None
        there = map(operator.is_not, grads, itertools.repeat(None))
        self._own = SlotGradients(self.layout, grads, on_host and all(there))
        try:
            yield
        finally:
            self._own = self._no_gradients()

    def _no_gradients(self) -> SlotGradients:
        return SlotGradients(self.layout, [None] * len(self.params), False)

    def overwritable(self, owners: Mapping[int, int]) -> list[bool]:
        """Which gradients are contiguous and lie in memory that is theirs alone, by slot.

        ``owners`` is how many arrays there are in each memory: what `count_owners` gives.
        """
        return [
            grad is not None
            and grad.flags.c_contiguous
            and grad.flags.writeable
            and grad.dtype == self.layout.dtype
            and owners[id(root_of(grad))] == 1
            for grad in gradients_of(self.params)
        ]

    def read_piece(self, owner: int, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        """This rank's gradients of a piece of some shard; see `Gradients.read_piece`.

        Args:
            owner: Rank of the shard; the piece names its parameters itself.
            piece: What of the shard is read.
            scratch: Memory of the piece's size.

        Returns:
            A view of one gradient if the piece lies within it, else ``scratch``, packed.
        """
        return self._own.read_piece(piece, scratch)

    def copy_gradients(self, flat: np.ndarray) -> None:
        """Copies this rank's gradients into an array like ``flat``, in host memory."""
        for slot in self.layout.slots:
            grad = self._own.whole(slot.index)
            flat[slot.start_f : slot.stop_f] = 0 if grad is None else grad

    def pack_bucket(
        self, bucket: Bucket, out: Any, scale: float, gradients: SlotGradients | None = None
    ) -> None:
        """This rank's gradients of a bucket, in one launch; see `Gradients.pack_bucket`.

        Args:
            bucket: The bucket.
            out: Its memory.
            scale: See `Gradients.pack_bucket`.
            gradients: What is packed, if not what `gradients` has taken.
        """
        assert self.memory.launcher is not None
        own = self._own if gradients is None else gradients
        if bucket not in self._packs:
            parts, indices = [], []
            filled_f = bucket.start_f
            for slot in self.layout.slots_of_buckets[bucket]:
                start_f = max(slot.start_f, bucket.start_f)
                stop_f = min(slot.stop_f, bucket.stop_f)
                size, start_b = stop_f - start_f, start_f - bucket.start_f
                # Gaps are zeros, too: whoever sums up a shard passes over none of it.
                parts.append(PackedPart(0, start_f - filled_f, filled_f - bucket.start_f))
                parts.append(PackedPart(start_f - slot.start_f, size, start_b))
                indices.append(slot.index)
                filled_f = stop_f
            parts.append(PackedPart(0, bucket.stop_f - filled_f, filled_f - bucket.start_f))
            self._packs[bucket] = PackTable(self.memory.launcher, parts), indices
        table, indices = self._packs[bucket]
        sources: list[Any] = [None] * (2 * len(indices) + 1)
        sources[1::2] = [own.whole(index) for index in indices]
        table.pack(sources, out, scale)

    def store_piece(self, piece: Piece, mean: Mean) -> None:
        """Writes mean gradients into ``flat_grad``: a `smorms3_dist.collectives.base.Consume`."""
        for segment in piece.segments:
            part = mean.part(segment.start_s - piece.start_s, segment.stop_s - piece.start_s)
            part.evaluate(self.flat_grad[segment.range_f])

    def gradient(self, segment: Segment) -> np.ndarray | None:
        """This rank's gradient of a segment, or ``None`` where the parameter has none."""
        return self._own.of(segment)


class SlotGradients:
    """A rank's gradients of a group, as they lie, by slot.

    Args:
        layout: Of the group.
        grads: The gradients; ``None`` reads as zeros.
        side_by_side: Whether all of them are there, in host memory, with no gaps between them: what
            lies in one piece is then packed by one call.
    """

    def __init__(self, layout: GroupLayout, grads: list[Any], side_by_side: bool) -> None:
        self._layout = layout
        self._grads = grads
        self._side_by_side = side_by_side

    def take(self, index: int, grad: Any | None) -> None:
        """Takes the gradient of a slot that has none yet."""
        if grad is None:
            self._side_by_side = False
        self._grads[index] = grad

    def read_piece(self, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        """The gradients of a piece of some shard; see `Gradients.read_piece`."""
        if len(piece.segments) == 1:
            grad = self.of(piece.segments[0])
            if grad is not None:
                return grad
        elif self._side_by_side and piece.segments:
            # All but the first and the last are whole; these are flattened on the way.
            parts = self._all_in(piece)
            parts[0], parts[-1] = map(self.of, (piece.segments[0], piece.segments[-1]))
            return np.concatenate(parts, axis=None, out=scratch, casting="unsafe")
        if not self._layout.dense:
            scratch[...] = 0  # the gaps
        for segment in piece.segments:
            start = segment.start_s - piece.start_s
            grad = self.of(segment)
            scratch[start : start + segment.size] = 0 if grad is None else grad
        return scratch

    def of(self, segment: Segment) -> np.ndarray | None:
        """The gradient of a segment, or ``None`` where the parameter has none."""
        grad = self.whole(segment.slot.index)
        if grad is None or segment.size == grad.size:
            return grad
        return grad[segment.range_p]

    def whole(self, index: int) -> Any:
        """The gradient of a slot, flat: a copy, made once, if it is not contiguous."""
        grad = self._grads[index]
        if grad is not None and not (grad.ndim == 1 and grad.flags.c_contiguous):
            grad = self._grads[index] = grad.ravel()
        return grad

    def _all_in(self, piece: Piece) -> list[Any]:
        """The whole gradients of the parameters in a piece."""
        first, last = piece.segments[0].slot.index, piece.segments[-1].slot.index
        if last - first == len(piece.segments) - 1:
            return self._grads[first : last + 1]
        # Parameters without elements lie nowhere.
        return [self._grads[segment.slot.index] for segment in piece.segments]


def count_owners(arrays: Iterable[Any]) -> Mapping[int, int]:
    """How many of the arrays lie in each memory, by the id of what owns that.

    Chainer may give one array to several parameters as their gradient, and views of one.
    """
    return collections.Counter(id(root_of(array)) for array in arrays if array is not None)


def root_of(array: Any) -> Any:
    """The array that owns the memory of a view; anything else itself."""
    while (base := _base_of(array)) is not None:
        array = base
    return array


def _base_of(array: Any) -> Any:
    base = getattr(array, "base", None)
    if isinstance(base, memoryview):
        return base.obj
    if base is None and isinstance(array, cuda.ndarray):
        # As of what `CudaMemory.apart` makes.
        return getattr(array.data.mem, "_owner", None)
    return base


def _give(param: chainer.Parameter, array: np.ndarray) -> None:
    """Gives a parameter an array with the values that it has."""
    if param.initializer is param.array:
        # Chainer keeps the array that a parameter was made of: all of it twice.
        param.initializer = array
    param.array = array


def _view(flat: np.ndarray, slot: Slot) -> np.ndarray:
    return flat[slot.start_f : slot.stop_f].reshape(slot.shape)
