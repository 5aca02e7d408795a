"""The patches for today's SciPy, h5py, protobuf and onnx, where those are installed."""

from __future__ import annotations

import functools
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from smorms3_dist.compat.patch import Patch, View, lent, with_names

# --- SciPy ------------------------------------------------------------------------------------


def _scipy_refuses_float16() -> bool:
    try:
        from scipy import sparse
    except ImportError:
        return False
    import numpy

    half = numpy.ones((1, 1), numpy.float16)
    try:
        sparse.coo_matrix(([half[0, 0]], ([0], [0])), dtype=half.dtype).dot(half)
    except ValueError:
        return True
    return False


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


def _h5py_has_no_strings() -> bool:
    """Whether strings are read as bytes; these versions have a method to read strings."""
    try:
        import h5py
    except ImportError:
        return False
    return hasattr(h5py.Dataset, "asstr")


def _mend_hdf5(module: ModuleType) -> None:
    """Reads strings as strings; and writes them, which Chainer does not with any h5py."""
    read = module.HDF5Deserializer.__call__
    write = module.HDF5Serializer.__call__
    save = module.save_hdf5

    def storable(value: Any) -> Any:
        """A string, in an array or not, in a form that h5py stores; other values as they are."""
        import h5py
        import numpy

        if isinstance(value, str) or getattr(getattr(value, "dtype", None), "kind", None) == "U":
            return numpy.array(value, h5py.string_dtype())
        return value

    @functools.wraps(read)
    def read_value(self: Any, key: str, value: Any) -> Any:
        found = read(self, key, value)
        # Where there is nothing to read, what was given comes back.
        if isinstance(value, str) and found is not value and found is not None:
            return self.group[key].asstr()[()]
        return found

    @functools.wraps(write)
    def write_value(self: Any, key: str, value: Any) -> Any:
        write(self, key, storable(value))
        return value

    @functools.wraps(save)
    def save_hdf5(filename: Any, obj: Any, compression: int = 4) -> None:
        if isinstance(obj, dict):
            obj = {key: storable(value) for key, value in obj.items()}
        save(filename, obj, compression)

    module.HDF5Deserializer.__call__ = read_value
    module.HDF5Serializer.__call__ = write_value
    module.save_hdf5 = save_hdf5  # type: ignore[attr-defined]


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
        from onnx import TensorProto, helper

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


LIBRARY_PATCHES = (
    Patch(
        name="scipy-float16",
        module="chainer.functions.math.sparse_matmul",
        reason="It multiplies sparse float16 arrays, which SciPy >= 1.11 refuses.",
        needed=_scipy_refuses_float16,
        mend=_mend_sparse_matmul,
    ),
    Patch(
        name="hdf5-strings",
        module="chainer.serializers.hdf5",
        reason="It takes what h5py >= 3 reads of a string for one, and that is bytes.",
        needed=_h5py_has_no_strings,
        mend=_mend_hdf5,
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
)
