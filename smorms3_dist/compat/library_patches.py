"""The patches for today's SciPy, h5py, protobuf and onnx, and for ChainerX, which is not there."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from smorms3_dist.compat.patch import Patch, View, lent, with_names

# --- SciPy ------------------------------------------------------------------------------------


def _is_at_least(name: str, *least: int) -> Callable[[], bool]:
    """Makes a test of a library's version, which does not import it: that would take too long."""

    def is_at_least() -> bool:
        from importlib import metadata

        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            return False
        return tuple(int(part) for part in re.findall("[0-9]+", found)[: len(least)]) >= least

    return is_at_least


def _mend_sparse_matmul(module: ModuleType) -> None:
    original = module._coo_matmul_cpu

    @functools.wraps(original)
    def _coo_matmul_cpu(A_data: Any, row: Any, col: Any, shape: Any, B: Any, dtype: Any) -> Any:
        # In float32, as SciPy computed it, and on GPUs Chainer does.
        import numpy

        A_data, B = (
            array.astype(numpy.float32) if array.dtype == numpy.float16 else array
            for array in (A_data, B)
        )
        return original(A_data, row, col, shape, B, dtype)

    module._coo_matmul_cpu = _coo_matmul_cpu  # type: ignore[attr-defined]


# --- h5py -------------------------------------------------------------------------------------


def _storable(value: Any) -> Any:
    """A value in a form that h5py stores, if it is a string, in an array or not, or ``None``."""
    import h5py
    import numpy

    array = numpy.asarray(value)
    if array.dtype.kind == "U":
        return array.astype(h5py.string_dtype())
    if array.dtype.kind == "O" and array.tolist() is None:
        # As Chainer stores it.
        empty = h5py.Empty("f")
        empty.size = 0
        return empty
    return array


def _as_array(value: Any, dtype: Any = None) -> Any:
    """Stands in for ``numpy.asarray``: of strings in a file it makes an array of strings."""
    import h5py
    import numpy

    if not isinstance(value, h5py.Dataset):
        return _storable(value)
    if h5py.check_string_dtype(value.dtype) is not None:
        return numpy.asarray(value.asstr()[()], "U")
    return numpy.asarray(value, dtype)


def _to_cpu(value: Any) -> Any:
    """Stands in for ``chainer.backends._cpu._to_cpu``."""
    from chainer.backends import _cpu

    return _storable(_cpu._to_cpu(value))


# --- protobuf ---------------------------------------------------------------------------------


def _protobuf_refuses_descriptors() -> bool:
    """Whether code that protoc < 3.19 has generated cannot be executed."""
    try:
        from google.protobuf import descriptor
    except ImportError:
        return False
    try:
        descriptor.EnumValueDescriptor(name="A", index=0, number=0, options=None, type=None)
    except TypeError:
        return True
    return False


def _fill_from_description(module: ModuleType) -> None:
    """Makes the messages of a generated module from the description that is part of its code.

    They have a pool of their own: another ``caffe.proto``, such as Caffe's, may be imported, too.
    """
    from google.protobuf import descriptor_pool
    from google.protobuf.internal import builder

    assert module.__spec__ is not None and module.__spec__.loader is not None
    code = module.__spec__.loader.get_code(module.__name__)  # type: ignore[attr-defined]
    start = "\n\x0bcaffe.proto"  # the first field of a file's description, its name
    description = next(c for c in code.co_consts if isinstance(c, str) and c.startswith(start))
    file = descriptor_pool.DescriptorPool().AddSerializedFile(description.encode("latin1"))
    names = vars(module)
    names["DESCRIPTOR"] = file
    builder.BuildMessageAndEnumDescriptors(file, names)
    builder.BuildTopDescriptorsAndMessages(file, module.__name__, names)


# --- onnx -------------------------------------------------------------------------------------


class _TensorTypes:
    """Stands in for ``onnx.mapping.NP_TYPE_TO_TENSOR_TYPE``."""

    def __getitem__(self, dtype: Any) -> int:
        from onnx import helper

        return int(helper.np_dtype_to_tensor_dtype(dtype))


class _Fields:
    """Stands in for ``onnx.mapping.STORAGE_TENSOR_TYPE_TO_FIELD``."""

    def get(self, tensor_type: int, default: None) -> str | None:
        from onnx import helper

        if helper.tensor_dtype_to_storage_tensor_dtype(tensor_type) != tensor_type:
            return default
        field: str = helper.tensor_dtype_to_field(tensor_type)
        return field


_mapping = ModuleType("onnx.mapping")
_mapping.NP_TYPE_TO_TENSOR_TYPE = _TensorTypes()  # type: ignore[attr-defined]
_mapping.STORAGE_TENSOR_TYPE_TO_FIELD = _Fields()  # type: ignore[attr-defined]


def _onnx_lacks_mapping() -> bool:
    spec = PathFinder.find_spec("onnx")
    if spec is None or spec.origin is None:
        return False
    return PathFinder.find_spec("onnx.mapping", spec.submodule_search_locations) is None


# --- ChainerX ---------------------------------------------------------------------------------


def _lacks_chainerx() -> bool:
    return not import_module("chainerx").is_available()


def _mend_observation_aggregator(module: ModuleType) -> None:
    """Brings variables to the host as arrays: it would ask ChainerX for its device ``native``."""
    aggregator = module.ObservationAggregator
    compute_summary = aggregator.compute_summary

    @functools.wraps(compute_summary)
    def with_arrays(self: Any, trainer: Any) -> Any:
        value = trainer.observation.get(self.original_key)
        if isinstance(value, module.Variable):
            to_cpu = import_module("chainer.backends.cuda").to_cpu
            trainer.observation[self.original_key] = to_cpu(value.array)
        return compute_summary(self, trainer)

    aggregator.compute_summary = with_arrays


LIBRARY_PATCHES = (
    Patch(
        name="scipy-float16",
        module="chainer.functions.math.sparse_matmul",
        reason="It multiplies sparse float16 arrays, which SciPy >= 1.11 refuses.",
        needed=_is_at_least("scipy", 1, 11),
        mend=_mend_sparse_matmul,
    ),
    Patch(
        name="hdf5-strings",
        module="chainer.serializers.hdf5",
        reason="It takes what h5py reads of strings, bytes from 3 on, for strings; it writes none.",
        needed=_is_at_least("h5py", 3),
        mend=with_names(
            numpy=View("numpy", asarray=_as_array),
            _cpu=View("chainer.backends._cpu", _to_cpu=_to_cpu),
        ),
    ),
    Patch(
        name="caffe-messages",
        module="chainer.links.caffe.protobuf3.caffe_pb2",
        reason="It was generated by a protoc whose code protobuf >= 4 refuses.",
        needed=_protobuf_refuses_descriptors,
        instead=_fill_from_description,
    ),
    Patch(
        name="onnx-mapping",
        module="onnx_chainer",
        reason="It imports onnx.mapping, which onnx >= 1.19 does not have.",
        needed=_onnx_lacks_mapping,
        during=lambda: lent({"onnx.mapping": _mapping}),
    ),
    Patch(
        name="onnx-mapping-of-constants",
        module="onnx_chainer.context",
        reason="It uses onnx.mapping, which onnx >= 1.19 does not have.",
        needed=_onnx_lacks_mapping,
        mend=with_names(onnx=View("onnx", mapping=_mapping)),
    ),
    Patch(
        name="observation-aggregator",
        module="chainermn.extensions.observation_aggregator",
        reason="It moves variables to a device of ChainerX, which no Python >= 3.10 has.",
        needed=_lacks_chainerx,
        mend=_mend_observation_aggregator,
    ),
)
