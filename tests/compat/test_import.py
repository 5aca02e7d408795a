"""Importing Chainer with the patches, and that nothing else is changed by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh import PRELUDES, WITHOUT_SETUPTOOLS, passes, succeed


@PRELUDES
def test_chainer_and_chainermn_import_with_warnings_as_errors(prelude: str, tmp_path: Path) -> None:
    code = prelude + "import smorms3_dist, chainer, chainermn"
    succeed(tmp_path, code, "-W", "error")


def test_every_module_of_chainer_imports(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, smorms3_dist
from importlib.machinery import PathFinder
names, failed = [], {}
for package in ('chainer', 'chainermn', 'onnx_chainer'):
    if package != 'onnx_chainer' or PathFinder.find_spec('onnx') is not None:
        path = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(path, package + '.', onerror=lambda name: None):
            names.append(module.name)
            try:
                importlib.import_module(module.name)
            except Exception as error:
                failed[module.name] = error
assert len(names) > 480 and not failed, (len(names), failed)
"""
    # Modules for tests say by an ImportWarning that they need a runtime for ONNX.
    passes(tmp_path, code, "-W", "error", "-W", "ignore::ImportWarning")


def test_importing_the_package_imports_neither_chainer_nor_numpy(tmp_path: Path) -> None:
    code = """
import sys, smorms3_dist.compat
assert not {'numpy', 'chainer', 'cupy', 'packaging', 'mpi4py', 'multiprocessing'} & set(sys.modules)
assert not {'dataclasses', 'smorms3_dist.compat.patches'} & set(sys.modules)
str(smorms3_dist.compat.report())
assert 'cupy' not in sys.modules
"""
    succeed(tmp_path, code)


@PRELUDES
def test_numpy_is_as_it_was_and_no_stub_is_left(prelude: str, tmp_path: Path) -> None:
    code = """
import sys, types, warnings, numpy, smorms3_dist
warnings.simplefilter('ignore')
before = dict(vars(numpy))
import chainer, chainermn, chainer.testing
import chainer.testing.doctest_helper, chainer.functions.array.resize_images
def lasting(names):
    # Real modules are imported whenever something asks for them.
    is_real = lambda value: isinstance(value, types.ModuleType) and value.__spec__.loader
    return {n: v for n, v in names.items() if n != '__warningregistry__' and not is_real(v)}
assert lasting(vars(numpy)) == lasting(before)
for name in sys.modules:
    if name.split('.')[0] == 'pkg_resources' or name.startswith('numpy.distutils'):
        assert sys.modules[name].__spec__.loader is not None, name
        assert 'smorms3_dist' not in sys.modules[name].__file__
"""
    succeed(tmp_path, prelude + code)


@PRELUDES
def test_only_the_patched_modules_of_chainer_hold_anything_of_ours(
    prelude: str, tmp_path: Path
) -> None:
    code = """
import os, sys, types, warnings
warnings.simplefilter('ignore')
import smorms3_dist, chainer
from smorms3_dist import compat
from fresh import import_patched
import_patched()

def ours(value):
    if isinstance(value, types.FunctionType):
        return 'smorms3_dist' in value.__code__.co_filename
    if isinstance(value, types.ModuleType):
        stands_in = ours(vars(value).get('__getattr__'))
        return 'smorms3_dist' in value.__name__ or stands_in
    return 'smorms3_dist' in type(value).__module__

touched = set()
for name, module in list(sys.modules.items()):
    if name.split('.')[0] not in ('chainer', 'chainermn', 'chainerx'):
        continue
    assert not ours(module.__loader__) and not ours(module.__spec__.loader), name
    for key, value in list(vars(module).items()):
        is_own = isinstance(value, type) and value.__module__ == name
        members = vars(value).values() if is_own else ()
        if any(map(ours, (value, *members))):
            touched.add(name)
resize_images = sys.modules['chainer.functions.array.resize_images']
view = resize_images.compute_indices_and_weights.__globals__['numpy']
if ours(view):
    touched.add(resize_images.__name__)
# Its own pool of messages.
caffe = sys.modules['chainer.links.caffe.protobuf3.caffe_pb2']
from google.protobuf import descriptor_pool
if caffe.DESCRIPTOR.pool is not descriptor_pool.Default():
    touched.add(caffe.__name__)
cuda = chainer.backends.cuda
if cuda.available and cuda._cudnn_disabled_by_user and 'CHAINER_CUDNN' not in os.environ:
    touched.add(cuda.__name__)
applied = {record.module for record in compat.report() if record.applied}
assert touched == {name for name in applied if name.startswith('chainer')}, (touched, applied)
"""
    succeed(tmp_path, prelude + code)


@pytest.mark.parametrize(
    ("version", "warning"), [("7.8.0", None), ("13.6.0", "cupy) version 13.6.0 may not be")]
)
def test_chainer_still_checks_its_optional_dependencies(
    version: str, warning: str | None, tmp_path: Path
) -> None:
    metadata = tmp_path / f"cupy-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: cupy\nVersion: {version}\n")
    code = "import smorms3_dist, chainer"
    output = passes(tmp_path, WITHOUT_SETUPTOOLS + code)
    if warning is None:
        assert "may not be compatible" not in output
        assert not output or "multiple CuPy packages" in output  # CuPy's, where it is installed
    else:
        assert warning in output


@pytest.mark.parametrize("blas", ["openblas", "accelerate"])
def test_chainer_on_macos_warns_about_a_numpy_on_accelerate(blas: str, tmp_path: Path) -> None:
    code = f"""
import smorms3_dist, numpy, sys, warnings
import chainer
from chainer import _environment_check
if hasattr(numpy.__config__, 'get_info'):
    answer = dict(extra_link_args=['-Wl,Accelerate']) if {blas!r} == 'accelerate' else dict()
    numpy.__config__.get_info = lambda name: answer
else:
    numpy.show_config = lambda mode: {{'Build Dependencies': {{'blas': {{'name': {blas!r}}}}}}}
sys.platform = 'darwin'
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    _environment_check.check()
messages = [str(warning.message) for warning in caught]
assert len(messages) == ({blas!r} == 'accelerate'), messages
assert all(message.startswith('Accelerate has been detected') for message in messages)
"""
    succeed(tmp_path, WITHOUT_SETUPTOOLS + code)
