"""Each patch: without it something fails, with it the same works; where nothing fails, no patch.

The patches for CuPy have the same tests in ``test_cupy``.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

from smorms3_dist.compat import PACKAGES
from smorms3_dist.compat.cupy_patches import CUPY_PATCHES
from smorms3_dist.compat.patches import PATCHES

import pytest
from fresh import FORK_SERVER_BY_DEFAULT, WITHOUT_SETUPTOOLS, passes, run_code

# What each patch makes work. The output must be as it was with NumPy 1.23.
USES = {
    "numpy-sctypes": """
import numpy as np, chainer.functions as F, chainer
x = chainer.Variable(np.arange(4, dtype=np.float32))
y = F.as_strided(x, (3, 2), (1, 1), 0)
y.grad = np.ones((3, 2), dtype=np.float32)
y.backward()
assert x.grad.dtype == np.float32 and x.grad.tolist() == [1, 2, 2, 1]
""",
    "numpy-float": """
import numpy as np, chainer.functions as F, chainer
x = chainer.Variable(np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2))
def resized(**options):
    x.cleargrad()
    y = F.resize_images(x, (2, 4), **options)
    y.grad = np.ones_like(y.array)
    y.backward()
    assert y.dtype == x.grad.dtype == np.float32
    return y.array.ravel().tolist(), x.grad.ravel().tolist()
thirds = [0, 1 / 3, 2 / 3, 1, 2, 7 / 3, 8 / 3, 3]
np.testing.assert_allclose(resized()[0], thirds, rtol=1e-6)
np.testing.assert_allclose(resized()[1], [2, 2, 2, 2], rtol=1e-6)
quarters = [0, 0.25, 0.75, 1, 2, 2.25, 2.75, 3]
assert resized(align_corners=False) == (quarters, [2, 2, 2, 2])
assert resized(mode="nearest") == ([0, 0, 1, 1, 2, 2, 3, 3], [2, 2, 2, 2])
""",
    "meshgrid-list": """
import numpy as np, chainer
p = np.array([[0.5, 0.5], [0.25, 0.75]], dtype=np.float32)
for x in (np.array([1, 0]), chainer.Variable(np.array([1, 0]))):
    y = chainer.distributions.Categorical(p=p).log_prob(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.array, np.log([0.5, 0.25]), rtol=1e-6)
assert chainer.distributions.Categorical(p=p[1]).log_prob(np.array(1)).shape == ()
""",
    "pad-sequence-unsigned": """
import numpy as np, chainer.functions as F
for padding, expected in ((-1, 255), (-2, 254), (300, 44), (7, 7)):
    y = F.pad_sequence([np.array([1, 2], np.uint8), np.array([3], np.uint8)], padding=padding)
    assert y.dtype == np.uint8 and y.array.tolist() == [[1, 2], [3, expected]]
y = F.pad_sequence([np.array([1, 2], 'f'), np.array([3], 'f')], padding=-1)
assert y.dtype == np.float32 and y.array.tolist() == [[1, 2], [3, -1]]
""",
    "concat-examples-unsigned": """
import numpy as np, chainer
batch = [(np.array([1, 2], np.uint8), np.array([1, 2], 'f')),
         (np.array([3], np.uint8), np.array([3], 'f'))]
x, y = chainer.dataset.concat_examples(batch, padding=-1)
assert x.dtype == np.uint8 and x.tolist() == [[1, 2], [3, 255]]
assert y.dtype == np.float32 and y.tolist() == [[1, 2], [3, -1]]
""",
    "concat-examples-out": """
import warnings, numpy as np, chainer
batch = [np.ones((1, 3), 'f'), np.ones((2, 1), 'f')]
with warnings.catch_warnings():
    warnings.simplefilter('error')
    x = chainer.dataset.concat_examples(batch, padding=7)
assert x.tolist() == [[[1, 1, 1], [7, 7, 7]], [[1, 7, 7], [1, 7, 7]]] and x.dtype == np.float32
""",
    "array-device": """
import io, numpy as np, chainer
x = chainer.Variable(np.ones((2, 3), np.float32))
assert 'device: CPU' in x.debug_print().splitlines()[1]
assert 'device: None' in chainer.Variable().debug_print()
out = io.StringIO()
with chainer.function_hooks.PrintHook(file=out):
    chainer.functions.relu(x)
assert '- device: CPU' in out.getvalue()
""",
    "maxout-shape": """
import warnings, numpy as np, chainer
shapes = []
def fill(array):
    shapes.append(array.shape)
    array[...] = np.arange(array.size).reshape(array.shape)
with warnings.catch_warnings():
    warnings.simplefilter('error')
    maxout = chainer.links.Maxout(4, 2, 3, initialW=fill, initial_bias=fill)
assert shapes == [(2, 3, 4), (2, 3)]
assert maxout.linear.W.array.tolist() == np.arange(24).reshape(6, 4).tolist()
assert maxout.linear.b.array.tolist() == list(range(6))
assert maxout(np.ones((1, 4), 'f')).array.tolist() == [[40, 91]]
assert chainer.links.Maxout(4, 2, 3, np.ones((2, 3, 4), 'f'), None).linear.b is None
""",
    "multi-node-iterator-int": """
import numpy as np, chainermn
class Communicator:
    rank, messages = 1, [np.array([12], 'f'), np.array([2, 0, 1], 'f')]
    def bcast(self, message, root):
        return self.messages.pop(0)
iterator = chainermn.iterators.create_multi_node_iterator(None, Communicator())
assert iterator.dataset_size == 12 and type(iterator.dataset_size) is int
assert iterator._order.tolist() == [2, 0, 1]
""",
    "numpy-distutils": "import chainer",
    "pkg-resources": "import chainer",
    "pkg-resources-testing": """
import chainer.testing.helper as helper
assert not getattr(helper.with_requires('numpy>=1.10')(lambda: 0), '__unittest_skip__', False)
assert helper.with_requires('numpy>=99')(lambda: 0).__unittest_skip__
assert helper.with_requires('no-such-distribution')(lambda: 0).__unittest_skip__
assert helper.without_requires('numpy>=1.10')(lambda: 0).__unittest_skip__
""",
    "pkg-resources-doctest": """
from chainer.testing import doctest_helper
assert doctest_helper.skipif_requires_satisfied('numpy>=1.10')
assert not doctest_helper.skipif_requires_satisfied('numpy>=99')
""",
    "scipy-float16": """
import numpy as np, chainer, chainer.functions as F
a = np.array([[0.5, 0, 2], [0, 0, -1]], np.float16)
b = np.array([[1, 2], [3, 4], [5, 6]], np.float16)
for transposed in (False, True):
    sparse = chainer.utils.to_coo(a.T.copy() if transposed else a, requires_grad=True)
    dense = chainer.Variable(b)
    y = F.sparse_matmul(sparse, dense, transa=transposed)
    assert y.dtype == np.float16 and y.array.tolist() == a.dot(b).tolist()
    y.grad = np.ones_like(y.array)
    y.backward()
    assert dense.grad.dtype == sparse.data.grad.dtype == np.float16
    assert dense.grad.tolist() == [[0.5, 0.5], [0, 0], [1, 1]]
    assert sparse.data.grad.tolist() == [3, 11, 11]
""",
    "hdf5-strings": """
import h5py, json, numpy as np, chainer
from chainer.serializers import HDF5Deserializer, HDF5Serializer, save_hdf5
texts = {'empty': '', 'ascii': 'abc', 'other': 'gr\u00fc\u00df'}
with h5py.File('x', 'w') as file:
    for key, text in texts.items():
        assert HDF5Serializer(file)['s'](key, text) == text
    HDF5Serializer(file)('none', None)
    HDF5Serializer(file)('f', np.ones((2, 3), 'f'))
    file.create_dataset('theirs', data='by h5py')
with h5py.File('x', 'r') as file:
    read = HDF5Deserializer(file)
    for key, text in texts.items():
        assert type(read['s'](key, '-')) is str and read['s'](key, '-') == text
        assert read['s'](key, None)[()] == text
    assert read('theirs', '') == 'by h5py'
    assert read('none', 1) is None and read('f', None).dtype == np.float32
    assert HDF5Deserializer(file, strict=False)('nothing', 'kept') == 'kept'

class Log(chainer.training.Extension):
    text, values = '{}', [np.float32(1), None]
    def serialize(self, serializer):
        self.text = serializer('text', self.text)
        self.values = [serializer(str(i), value) for i, value in enumerate(self.values)]
target = chainer.serializers.DictionarySerializer()
Log().serialize(target)
save_hdf5('y', target.target)
log = Log()
log.text, log.values = '', [np.float32(7), 7]
chainer.serializers.load_hdf5('y', log)
assert (log.text, log.values) == ('{}', [1, None])
""",
    "caffe-messages": """
import numpy as np, chainer, chainer.functions as F
from chainer.links.caffe.protobuf3 import caffe_pb2
from chainer.exporters import caffe
assert caffe_pb2.TRAIN == 0 and caffe_pb2.Phase.Name(1) == 'TEST'
assert caffe_pb2.V1LayerParameter.CONVOLUTION == 4
assert caffe_pb2.BlobShape(dim=[2, 3]).SerializeToString() == b'\\n\\x02\\x02\\x03'
class Net(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv = chainer.links.Convolution2D(1, 2, 2)
            self.fc = chainer.links.Linear(8, 3)
    def forward(self, x):
        return F.softmax(self.fc(F.relu(self.conv(x))))
net, x = Net(), np.ones((1, 1, 3, 3), 'f')
caffe.export(net, [chainer.Variable(x)], '.', True)
loaded = chainer.links.caffe.CaffeFunction('chainer_model.caffemodel')
with chainer.using_config('train', False):
    y, = loaded(inputs={'data': x}, outputs=[loaded.layers[-1][0]])
np.testing.assert_allclose(y.array, net(x).array, rtol=1e-5)
""",
    "onnx-mapping": """
import onnx_chainer, numpy as np, chainer, io, onnx
net = chainer.Sequential(chainer.links.Linear(3, 2), chainer.functions.relu)
out = io.BytesIO()
onnx_chainer.export(net, np.ones((1, 3), 'f'), filename=out)
model = onnx.load_model_from_string(out.getvalue())
weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
assert [node.op_type for node in model.graph.node][-1] == 'Relu'
assert any(np.array_equal(w, net[0].W.array) for w in weights.values())
""",
    "onnx-mapping-of-constants": """
import onnx_chainer, numpy as np, chainer
from onnx import numpy_helper
from onnx_chainer.context import _tensor_from_array_for_constant as tensor_of
for dtype in (np.float16, np.float32, np.float64, np.uint8, np.int32, np.int64, np.bool_):
    values = np.array([[0, 1], [1, 0]], dtype)
    array = numpy_helper.to_array(tensor_of(values, 'c'))
    assert array.dtype == dtype and np.array_equal(array, values), dtype
assert list(tensor_of(np.array([2.5], 'f'), 'c').float_data) == [2.5]
assert list(tensor_of(np.array([-1, 3]), 'c').int64_data) == [-1, 3]
""",
    "set-daemon": """
import chainer, warnings
with warnings.catch_warnings():
    warnings.filterwarnings('error', 'setDaemon')
    iterator = chainer.iterators.MultiprocessIterator(
        range(4), 2, repeat=False, shuffle=False, n_processes=1, shared_mem=1)
    assert list(iterator) == [[0, 1], [2, 3]]
""",
    "iterator-at-exit": """
import atexit, chainer, os
left = [chainer.iterators.MultiprocessIterator(range(4), 2, repeat, n_processes=1, shared_mem=1)
        for repeat in (True, False)]
assert len(left[0].next()) == 2 and len(list(left[1])) == 2
threads = [iterator._prefetch_loop.thread for iterator in left]
assert all(thread.is_alive() for thread in threads)
atexit._run_exitfuncs()
if any(thread.is_alive() for thread in threads):
    os._exit(1)
""",
    # Scripts without a main block, whose workers get what cannot be pickled.
    "forked-iterator": """
import chainer
class Data(chainer.dataset.DatasetMixin):
    def __init__(self):
        self.function = lambda i: i * i
    def __len__(self):
        return 4
    def get_example(self, i):
        return self.function(i)
iterator = chainer.iterators.MultiprocessIterator(
    Data(), 2, repeat=False, shuffle=False, n_processes=1, shared_mem=1)
assert list(iterator) == [[0, 1], [4, 9]]
""",
    "forked-writers": """
from pathlib import Path
from chainer.training.extensions import snapshot_writers
writer = snapshot_writers.ProcessWriter(savefun=lambda path, target: Path(path).write_text(target))
writer('written', '.', 'by a child')
writer.finalize()
assert Path('written').read_text() == 'by a child'
""",
    "forked-updater": """
import multiprocessing
from chainer.training.updaters import multiprocess_parallel_updater
class Worker(multiprocess_parallel_updater._Worker):
    def __init__(self):
        multiprocessing.Process.__init__(self)
        self.model = lambda: None
    def run(self):
        self.model()
worker = Worker()
worker.start()
worker.join()
assert worker.exitcode == 0
""",
    # A lock is no choice, which it looks like.
    "start-method": """
import multiprocessing
from chainer.iterators import multiprocess_iterator
multiprocessing.Lock()
assert multiprocess_iterator.multiprocessing.get_start_method() == 'fork'
multiprocessing.set_start_method('forkserver', force=True)
assert multiprocess_iterator.multiprocessing.get_start_method() == 'forkserver'
multiprocessing.set_start_method('spawn', force=True)
assert multiprocess_iterator.multiprocessing.get_start_method() == 'spawn'
""",
    "communicator-of-child": """
import multiprocessing, os
import chainermn.communicators._communication_utility
os.environ['PMIX_RANK'] = '0'
answers = multiprocessing.get_context('fork').SimpleQueue()
def child():
    try:
        chainermn.create_communicator(mpi_comm=None)
    except RuntimeError as error:
        answers.put(str(error))
    answers.put('')
process = multiprocessing.get_context('fork').Process(target=child)
process.start()
process.join()
assert 'a child that multiprocessing has started in a rank' in answers.get()
""",
    "observation-aggregator": """
import types, numpy as np, chainer
from chainermn.extensions import ObservationAggregator
comm = types.SimpleNamespace(
    rank=0, gather_obj=lambda mine: [mine, [np.float32(4)]], bcast_obj=lambda value: value)
updater = types.SimpleNamespace(iteration=1)
for value in (chainer.Variable(np.array(2, 'f')), np.array(2, 'f'), 2.0):
    trainer = types.SimpleNamespace(observation={'main/loss': value}, updater=updater)
    ObservationAggregator(comm, 'main/loss', 'mean')(trainer)
    assert trainer.observation['mean'] == 3
    assert float(getattr(trainer.observation['main/loss'], 'array', 2)) == 2
""",
    # These two are scripts that start children; the first imports Chainer in the child, the second
    # finds it there because the server has preloaded it.
    "spawned-children": """
import multiprocessing
import chainer
def child():
    # Its import needs a patch also where NumPy and setuptools are old.
    import chainer.links.caffe
if __name__ == '__main__':
    for method in ('spawn', 'forkserver'):
        process = multiprocessing.get_context(method).Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0, method
""",
    "fork-server": """
import multiprocessing, sys
def child():
    assert 'chainer.links.caffe' in sys.modules
if __name__ == '__main__':
    multiprocessing.set_forkserver_preload(['chainer.links.caffe'])
    process = multiprocessing.get_context('forkserver').Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
""",
}

# Only in the parent, so that what children do shows what the patches do for them.
WITH = """
if __name__ == '__main__':
    from smorms3_dist import compat
"""

# Takes one patch out before anything that it mends is imported.
WITHOUT = """
if __name__ == '__main__':
    import sys
    from smorms3_dist import compat
    from smorms3_dist.compat.importer import Importer
    sys.meta_path.remove(compat._importer)
    Importer.of([patch for patch in compat.PATCHES if patch.name != {name!r}]).install()
"""

# What modules use of a library, which they import then only.
LAZY = {
    "lazy-download": ("chainer.dataset.download", "filelock.FileLock", "filelock"),
    "lazy-image-dataset": ("chainer.datasets.image_dataset", "Image.open", "PIL.Image"),
    "lazy-googlenet": ("chainer.links.model.vision.googlenet", "Image.fromarray", "PIL.Image"),
    "lazy-resnet": ("chainer.links.model.vision.resnet", "Image.fromarray", "PIL.Image"),
    "lazy-vgg": ("chainer.links.model.vision.vgg", "Image.fromarray", "PIL.Image"),
    "lazy-svhn": ("chainer.datasets.svhn", "io.loadmat", "scipy.io"),
    "lazy-multivariate-normal": (
        *("chainer.distributions.multivariate_normal", "scipy.linalg.solve_triangular"),
        "scipy.linalg",
    ),
    "lazy-erfcinv": ("chainer.functions.math.erfcinv", "special.erfcinv", "scipy.special"),
    "lazy-erfcx": ("chainer.functions.math.erfcx", "special.erfcx", "scipy.special"),
    "lazy-erfinv": ("chainer.functions.math.erfinv", "special.erfinv", "scipy.special"),
    "lazy-ndtri": ("chainer.functions.math.ndtri", "special.ndtri", "scipy.special"),
    "lazy-sparse-matmul": (
        *("chainer.functions.math.sparse_matmul", "sparse.coo_matrix", "scipy.sparse"),
    ),
    "lazy-hdf5": ("chainer.serializers.hdf5", "h5py.File", "h5py"),
}
for name, (module, used, library) in LAZY.items():
    USES[name] = f"""
import sys, chainer, {library}
module, library = sys.modules[{module!r}], sys.modules[{library!r}]
assert module.{used} is library.{used.rpartition(".")[2]}
assert module.{used.rpartition(".")[0]} is not library
"""

# This one is in force as soon as the package is imported, where multiprocessing is there before.
TAKE_BACK = {
    "start-method": "multiprocessing.set_start_method = "
    "multiprocessing.context._default_context.set_start_method\n"
}

CHECK_NEEDED = """
if __name__ == '__main__':
    record, = [record for record in compat.report() if record.name == {name!r}]
    assert record.applied == record.needed == {needed}, record
"""

NAMES = [patch.name for patch in PATCHES if patch not in CUPY_PATCHES]
# What these need depends on what else is installed, or on Python: they are tested where it is so.
ABSENCE = ["numpy-distutils", "pkg-resources", "pkg-resources-testing", "pkg-resources-doctest"]
FORKED = ["forked-iterator", "forked-writers", "forked-updater", "start-method"]


# What these mend cannot be used without a library, which need not be installed.
LIBRARIES = {
    "scipy-float16": "scipy",
    "hdf5-strings": "h5py",
    **{name: library.partition(".")[0] for name, (_, _, library) in LAZY.items()},
    "onnx-mapping": "onnx",
    "onnx-mapping-of-constants": "onnx",
}


def can_be_used(name: str) -> bool:
    return name not in LIBRARIES or PathFinder.find_spec(LIBRARIES[name]) is not None


def needed(name: str) -> bool:
    patch = next(patch for patch in PATCHES if patch.name == name)
    return name in ABSENCE or name in FORKED or patch.is_needed


def prelude(name: str) -> str:
    if name in ABSENCE:
        return WITHOUT_SETUPTOOLS
    return FORK_SERVER_BY_DEFAULT if name in FORKED else ""


def test_every_patch_has_a_use_here() -> None:
    assert sorted(USES) == sorted(NAMES)
    assert {patch.module.partition(".")[0] for patch in PATCHES} == PACKAGES


# Processes that start children, or end, are scripts of their own.
ALONE = ["spawned-children", "fork-server", "iterator-at-exit"]


@pytest.mark.parametrize(
    "names",
    [
        [name for name in NAMES if name not in {*ABSENCE, *FORKED, *ALONE}],
        *(ABSENCE, FORKED),
        *([name] for name in ALONE),
    ],
)
def test_they_work_with_the_patches_where_those_are_needed(
    names: list[str], tmp_path: Path
) -> None:
    checks = (
        USES[name] + CHECK_NEEDED.format(name=name, needed=needed(name))
        for name in filter(can_be_used, names)
    )
    passes(tmp_path, prelude(names[0]) + WITH + "".join(checks))


@pytest.mark.parametrize("name", [*filter(can_be_used, NAMES)])
def test_it_fails_without_the_patch_only_if_that_is_needed(name: str, tmp_path: Path) -> None:
    without = WITHOUT.format(name=name) + TAKE_BACK.get(name, "")
    status, output = run_code(tmp_path, prelude(name) + without + USES[name])
    assert (status != 0) == needed(name), output


def test_an_import_of_chainer_imports_no_library_that_few_scripts_use(tmp_path: Path) -> None:
    code = """
import sys
import smorms3_dist, chainer
few = {"scipy", "h5py", "PIL", "filelock", "numpy.distutils"}
assert not few & sys.modules.keys()
"""
    passes(tmp_path, code)
