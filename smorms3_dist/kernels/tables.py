"""The tables that drive the kernels for GPUs, and the launches that they are for.

One launch updates any number of runs, packs any number of gradients, or checks a whole gradient.
What differs from run to run (where it lies, its hyperparameters) stands in tables in device memory,
which are copied there when they change and at no other time; what is decided on the device (a clip
factor, a step to be skipped) is read there. Nothing here waits for the device.

All of this knows a `KernelLauncher` and nothing else of CUDA: the same tables drive the same source
on any hardware that it has been compiled for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from smorms3_dist.kernels.narrow import BFLOAT16

import numpy as np

if TYPE_CHECKING:
    # Not more: a plan for GPUs needs no Chainer.
    from smorms3_dist.kernels.chainer_rules import Constants, Formula

CHUNK = 8192
"""Elements that a block takes at a time: enough to hide what it costs to look them up, few enough
that the blocks of small parameters fill a GPU. A multiple of every vector."""

MAX_BLOCKS = 1 << 16
"""Most blocks of one launch; they take several chunks each where there are more."""

CHECK_BLOCKS = 1024
"""Most blocks of one check of a gradient, the same on every GPU, for the same sums."""

_THREADS = 256  # As in the source.
_MOST_STATES = 3  # That is how many pointers the update takes.
_FINISH_CHECK = "finish_check<SquaresAndNonfinite>"
_CHECK_ELEMENTS = 4096  # Elements of a block, while there are fewer than CHECK_BLOCKS.
_NAMES = {
    np.dtype(np.float16): "Half",
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
}

# The order is that of the codes in the source.
_PACKED = {**_NAMES, BFLOAT16: "Bfloat"}
_CODES = {dtype: code for code, dtype in enumerate(_PACKED)}


class KernelLauncher(Protocol):
    """Launches the kernels of ``smorms3.cu`` and holds their tables, on one device, in order."""

    def upload(self, host: np.ndarray) -> Any:
        """Returns a copy of an array on the device."""

    def overwrite(self, array: Any, host: np.ndarray) -> None:
        """Overwrites an array on the device by one of the same size, after earlier launches."""

    def fetch(self, array: Any) -> Callable[[], np.ndarray]:
        """Starts to copy an array to the host, as it is after earlier launches.

        What is returned waits for the copy, and gives it.
        """

    def pointer(self, array: Any) -> int:
        """The device address of an array's first element."""

    def launch(self, kernel: str, blocks: int, threads: int, *arguments: np.generic) -> None:
        """Launches a kernel, named as C++ does, such as ``update<Adam, float, float, float>``.

        Arguments are numbers of 8 bytes: ``float64``, ``int64``, and ``uint64`` for pointers.
        """

    def load(self, kernel: str) -> None:
        """Makes a kernel ready, so that its first launch takes no longer than others.

        Loading may compile, and may wait for all that the device does: it belongs where a model is
        laid out, not between the collectives of a step.
        """


class Run(NamedTuple):
    """Where neighbouring elements lie that are updated alike: offsets, in elements, and a size.

    Masters lie where the states do.
    """

    param: int
    grad: int
    state: int
    size: int


class Rates(NamedTuple):
    """The hyperparameters of a run.

    Attributes:
        constants: Those of the formula in this step, in its order.
        decay: What a weight decay of the update rule multiplies parameters by, before it adds them
            to the gradient, after the division by the loss scale; ``None`` for none.
    """

    constants: Constants
    decay: float | None = None


class Arrays(NamedTuple):
    """Contiguous arrays on the device that runs are parts of.

    Parameters are float16, float32 or float64; gradients, which are read only, and states are of
    the same dtype, or float32. States are those of the formula, in its order. Masters are the
    parameters in the states' dtype, if that is another.
    """

    param: Any
    grad: Any
    states: Sequence[Any]
    master: Any | None = None


class Preparation(NamedTuple):
    """What happens to gradients before the formula sees them, in the order of the attributes.

    Everything but the division is computed in the dtype of the parameters.

    Attributes:
        mean: They are multiplied by it: one over the world size, if they are sums.
        clip: A float64 array on the device of one element, or ``None``: they are multiplied by it
            unless it is 1 or more.
        decay: The parameters times this number are added to them: the rate of a weight decay of the
            optimizer, times the loss scale if there is one; ``None`` for none.
        loss_scale: They are divided by it, in the dtype of the states.
        skip: A float64 array on the device of one element, or ``None``: unless it is 0, the update
            does nothing at all.
    """

    mean: float = 1.0
    clip: Any | None = None
    decay: float | None = None
    loss_scale: float = 1.0
    skip: Any | None = None


def name_of_update(formula: Formula, param: np.dtype, grad: np.dtype, state: np.dtype) -> str:
    """The name of the kernel that applies a formula, given the dtypes of its arrays."""
    return f"update<{formula.name}, {', '.join(_NAMES[dtype] for dtype in (param, grad, state))}>"


def name_of_pack(bucket: np.dtype) -> str:
    """The name of the kernel that packs into buckets of a dtype."""
    return f"pack<{_PACKED[bucket]}>"


def _name_of_check(param: np.dtype, grad: np.dtype) -> str:
    return f"check<{_NAMES[param]}, {_NAMES[grad]}>"


def names_of_check(dtype: np.dtype) -> tuple[str, str]:
    """The names of the kernels that check gradients in the dtype of their parameters."""
    return _name_of_check(dtype, dtype), _FINISH_CHECK


class UpdateTable:
    """Runs that are updated by one formula in one launch; no two may overlap."""

    def __init__(self, launcher: KernelLauncher, formula: Formula, runs: Sequence[Run]) -> None:
        self._launcher = launcher
        self._formula = formula
        locations = _table(runs, 4)
        self._extents = (locations[:, :3] + locations[:, 3:]).max(axis=0, initial=0).tolist()
        self._chunks = _Chunks(launcher, locations[:, 3])
        self._sizes = locations[:, 3].tolist()
        self._in_arrays = np.ascontiguousarray(locations[:, :3])
        self._locations = _DeviceTable(launcher, self._in_arrays)
        self._columns = formula.constant_count + 1
        self._rates = _DeviceTable(launcher, np.full((len(runs), self._columns), np.nan))

    def set_rates(self, rates: Sequence[Rates]) -> None:
        """Sets the hyperparameters of the runs, in their order; to be done before an update."""
        rows = [(*constants, _or_nan(decay)) for constants, decay in rates]
        self._rates.set(np.array(rows, np.float64).reshape(-1, self._columns))

    def update(self, arrays: Arrays, preparation: Preparation | None = None) -> None:
        """Updates the runs of these arrays.

        Raises:
            ValueError: If an array has a wrong dtype, is not contiguous, or ends before a run.
        """
        self._locations.set(self._in_arrays)
        self._update(arrays, arrays.grad.dtype, arrays.grad, preparation)

    def update_apart(
        self, arrays: Arrays, gradients: Sequence[Any], preparation: Preparation | None = None
    ) -> None:
        """Updates the runs, each by a gradient of its own, read where it lies.

        Args:
            arrays: The arrays, of which ``grad`` is not used.
            gradients: An array for each run, in their order; all of the dtype of the parameters.
            preparation: See `update`.

        Raises:
            ValueError: See `update`.
        """
        dtype = arrays.param.dtype
        for index, (size, gradient) in enumerate(zip(self._sizes, gradients, strict=True)):
            _check(f"gradient {index}", gradient, [dtype], size)
        # From the null pointer on, in elements: addresses are multiples of their size.
        addresses = np.array([*map(self._launcher.pointer, gradients)], np.int64)
        assert not (addresses % dtype.itemsize).any()
        locations = self._in_arrays.copy()
        locations[:, 1] = addresses // dtype.itemsize
        self._locations.set(locations)
        self._update(arrays, dtype, None, preparation)

    def _update(
        self, arrays: Arrays, grad_dtype: np.dtype, grad: Any, preparation: Preparation | None
    ) -> None:
        how = preparation or Preparation()
        param, gradient, state = self._extents
        low, names = arrays.param.dtype, self._formula.states
        states = dict(zip(names, arrays.states, strict=True))
        if arrays.master is not None:
            states["master"] = arrays.master
        wide = next(iter(states.values()), arrays.param).dtype
        _check("param", arrays.param, _NAMES, param)
        if grad is not None:
            _check("grad", grad, _or_float32(low), gradient)
        for index, (name, array) in enumerate(states.items()):
            _check(name, array, [wide] if index else _or_float32(low), state)
        if (arrays.master is None) != (low == wide):
            raise ValueError(
                f"{low} parameters and {wide} states "
                + ("need masters" if arrays.master is None else "leave nothing for masters to do")
            )
        self._chunks.launch(
            name_of_update(self._formula, low, grad_dtype, wide),
            self._pointer(self._locations.array),
            self._pointer(self._rates.array),
            self._pointer(arrays.param),
            self._pointer(grad),
            *map(self._pointer, (*arrays.states, *[None] * (_MOST_STATES - len(names)))),
            self._pointer(arrays.master),
            np.float64(how.mean),
            self._number("clip", how.clip),
            _or_nan(how.decay),
            np.float64(how.loss_scale),
            self._number("skip", how.skip),
        )

    def _pointer(self, array: Any | None) -> np.uint64:
        return np.uint64(0 if array is None else self._launcher.pointer(array))

    def _number(self, name: str, array: Any | None) -> np.uint64:
        if array is not None:
            _check(name, array, [np.dtype(np.float64)], 1)
        return self._pointer(array)


class PackedPart(NamedTuple):
    """A part of a gradient: its first element there, its size, and its first one in the bucket."""

    start_p: int
    size: int
    start_b: int


class PackTable:
    """Parts of gradients that are packed into a bucket, without overlap, in one launch."""

    def __init__(self, launcher: KernelLauncher, parts: Sequence[PackedPart]) -> None:
        self._launcher = launcher
        table = _table(parts, 3)
        self._starts = table[:, 0].tolist()
        self._stops = (table[:, 0] + table[:, 1]).tolist()
        self._extent = (table[:, 1] + table[:, 2]).max(initial=0).item()
        self._chunks = _Chunks(launcher, table[:, 1])
        self._offsets = launcher.upload(np.ascontiguousarray(table[:, 2]))
        self._sources = _DeviceTable(launcher, np.zeros((len(parts), 2), np.int64))

    def pack(self, gradients: Sequence[Any | None], bucket: Any, scale: float = 1.0) -> None:
        """Packs one part of each gradient.

        Args:
            gradients: float16, float32, float64 or `BFLOAT16` arrays on the device, contiguous, one
                for each part; ``None`` is packed as zeros.
            bucket: The target, of any of these dtypes; between the parts it is not written.
            scale: What they are multiplied by, in the widest dtype of float32, the gradient's and
                the bucket's, before they are rounded to the bucket's (float64 to float32 first
                where that is bfloat16).

        Raises:
            ValueError: If an array has a wrong dtype, is not contiguous, or ends before a part.
        """
        _check("bucket", bucket, _PACKED, self._extent)
        sources = np.zeros((len(self._stops), 2), np.int64)
        for index, (gradient, stop) in enumerate(zip(gradients, self._stops, strict=True)):
            if gradient is not None:
                _check(f"gradient {index}", gradient, _PACKED, stop)
                start = self._starts[index] * gradient.dtype.itemsize
                sources[index] = self._launcher.pointer(gradient) + start, _CODES[gradient.dtype]
        self._sources.set(sources)
        pointers = map(self._launcher.pointer, (self._offsets, self._sources.array, bucket))
        self._chunks.launch(
            name_of_pack(bucket.dtype), *map(np.uint64, pointers), np.float64(scale)
        )


class GradientCheck:
    """The norm of a gradient, of ranges of these sizes, and whether it is finite, in one pass.

    Attributes:
        result: A float64 array of two elements on the device: the sum of the squares, and the
            number of elements that are not finite (the sum is then not finite, either). Both can
            be summed over ranks; ``result[1:]`` can be a `Preparation`'s ``skip``.
    """

    def __init__(self, launcher: KernelLauncher, sizes: Sequence[int]) -> None:
        self._launcher = launcher
        self._sizes = tuple(sizes)
        self._blocks = [min(-(-size // _CHECK_ELEMENTS), CHECK_BLOCKS) for size in self._sizes]
        self._partials = launcher.upload(np.zeros((max(sum(self._blocks), 1), 2)))
        self.result = launcher.upload(np.zeros(2))

    def run(self, grads: Sequence[Any], dtype: np.dtype, mean: float = 1.0) -> None:
        """Finds ``result``; ``dtype`` is that of the parameters, ``mean`` as in `Preparation`.

        The squares are summed in float64 and in an order that depends on the sizes and dtypes of
        the ranges alone: contiguous arrays of the parameters' dtype, or float32.

        Raises:
            ValueError: If an array has a wrong dtype or size, or is not contiguous.
        """
        address = self._launcher.pointer(self._partials)
        for grad, size, blocks in zip(grads, self._sizes, self._blocks, strict=True):
            _check("grad", grad, _or_float32(dtype), size)
            if blocks:
                self._launcher.launch(
                    _name_of_check(dtype, grad.dtype),
                    blocks,
                    _THREADS,
                    np.uint64(self._launcher.pointer(grad)),
                    np.int64(size),
                    np.float64(mean),
                    np.uint64(address),
                )
            address += blocks * 16
        self._launcher.launch(
            _FINISH_CHECK,
            1,
            _THREADS,
            np.uint64(self._launcher.pointer(self._partials)),
            np.int64(sum(self._blocks)),
            np.uint64(self._launcher.pointer(self.result)),
        )


class _Chunks:
    """Ranges cut into parts of at most `CHUNK` elements, as a table on the device."""

    def __init__(self, launcher: KernelLauncher, sizes: np.ndarray) -> None:
        self._launcher = launcher
        counts = -(-sizes // CHUNK)
        self._count = int(counts.sum())
        owners = np.repeat(np.arange(len(sizes)), counts)
        starts = (np.arange(self._count) - np.repeat(np.cumsum(counts) - counts, counts)) * CHUNK
        lengths = np.minimum(sizes[owners] - starts, CHUNK)
        self._table = launcher.upload(np.stack([owners, starts, lengths], axis=1))

    def launch(self, kernel: str, *arguments: np.generic) -> None:
        if self._count:
            self._launcher.launch(
                kernel,
                min(self._count, MAX_BLOCKS),
                _THREADS,
                np.uint64(self._launcher.pointer(self._table)),
                np.int64(self._count),
                *arguments,
            )


class _DeviceTable:
    """A table on the device that is copied there when it changes."""

    def __init__(self, launcher: KernelLauncher, host: np.ndarray) -> None:
        self._launcher = launcher
        self._host = host
        self.array = launcher.upload(host)

    def set(self, host: np.ndarray) -> None:
        if host.shape != self._host.shape:
            raise ValueError(f"a table of {len(self._host)} rows cannot take {len(host)}")
        # By bytes: nan is equal to itself here.
        if host.tobytes() != self._host.tobytes():
            self._host = host
            self._launcher.overwrite(self.array, host)


def _table(rows: Sequence[Sequence[int]], columns: int) -> np.ndarray:
    table = np.array(rows, np.int64).reshape(-1, columns)
    if (table < 0).any():
        raise ValueError("offsets and sizes must not be negative")
    return table


def _or_float32(dtype: np.dtype) -> Sequence[np.dtype]:
    """The dtypes of gradients and states that parameters of a dtype can have."""
    return [dtype, np.dtype(np.float32)] if dtype == np.float16 else [dtype]


def _or_nan(decay: float | None) -> np.float64:
    """A decay as the kernels take it: nan if there is none."""
    return np.float64(np.nan if decay is None else decay)


def _check(name: str, array: Any, dtypes: Any, size: int) -> None:
    """Raises ValueError unless a kernel may touch the first elements of an array."""
    if array.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {array.dtype}, not {' or '.join(map(str, dtypes))}")
    if array.size < size:
        raise ValueError(f"{name} has {array.size} elements, but {size} are to be used")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous")
