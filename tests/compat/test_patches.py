"""Each patch: without it something fails, with it the same works; where nothing fails, no patch.

The patches for CuPy have the same tests in ``test_cupy``.
"""

from __future__ import annotations

from pathlib import Path

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
    "set-daemon": """
import chainer, warnings
with warnings.catch_warnings():
    warnings.filterwarnings('error', 'setDaemon')
    iterator = chainer.iterators.MultiprocessIterator(
        range(4), 2, repeat=False, shuffle=False, n_processes=1, shared_mem=1)
    assert list(iterator) == [[0, 1], [2, 3]]
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
    # These two are scripts that start children; the first imports Chainer in the child, the second
    # finds it there because the server has preloaded it.
    "spawned-children": """
import multiprocessing
import chainer
def child():
    assert chainer.functions.relu
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
    assert 'chainer' in sys.modules
if __name__ == '__main__':
    multiprocessing.set_forkserver_preload(['chainer'])
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
    Importer([patch for patch in compat.PATCHES if patch.name != {name!r}]).install()
"""

# This one is in force as soon as the package is imported, which imports multiprocessing itself.
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


def needed(name: str) -> bool:
    patch = next(patch for patch in PATCHES if patch.name == name)
    return name in ABSENCE or name in FORKED or patch.is_needed


def prelude(name: str) -> str:
    if name in ABSENCE:
        return WITHOUT_SETUPTOOLS
    return FORK_SERVER_BY_DEFAULT if name in FORKED else ""


def test_every_patch_has_a_use_here() -> None:
    assert sorted(USES) == sorted(NAMES)


# Processes that start children are scripts of their own.
ALONE = ["spawned-children", "fork-server"]


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
    checks = (USES[name] + CHECK_NEEDED.format(name=name, needed=needed(name)) for name in names)
    passes(tmp_path, prelude(names[0]) + WITH + "".join(checks))


@pytest.mark.parametrize("name", NAMES)
def test_it_fails_without_the_patch_only_if_that_is_needed(name: str, tmp_path: Path) -> None:
    without = WITHOUT.format(name=name) + TAKE_BACK.get(name, "")
    status, output = run_code(tmp_path, prelude(name) + without + USES[name])
    assert (status != 0) == needed(name), output
