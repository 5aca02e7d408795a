"""What `smorms3_dist.compat` tells about itself."""

from __future__ import annotations

import sys
from pathlib import Path

from smorms3_dist import compat
from smorms3_dist.compat.importer import Importer
from smorms3_dist.compat.patches import PATCHES

from fresh import PRELUDES, WITHOUT_SETUPTOOLS, passes

# Imports Chainer the way that people did before there were these patches.
STUBBED_CHAINER = """
import sys, types, numpy
names = ('numpy.distutils', 'numpy.distutils.system_info', 'pkg_resources')
stubs = {name: types.ModuleType(name) for name in names}
stubs['pkg_resources'].DistributionNotFound = Exception
sys.modules.update(stubs)
dropped = not hasattr(numpy, 'sctypes')
if dropped:
    numpy.sctypes = {'int': [numpy.int32, numpy.int64], 'float': []}
import chainer
for name in stubs:
    del sys.modules[name]
if dropped:
    del numpy.sctypes
"""


def test_there_is_one_record_a_patch_with_all_that_a_reader_needs() -> None:
    report = compat.report()
    assert [record.name for record in report] == list(dict.fromkeys(p.name for p in PATCHES))
    for record, line in zip(report, str(report).splitlines(), strict=True):
        assert record.reason.endswith(".")
        assert record.name in line and record.module in line and record.reason in line


def test_a_record_says_whether_its_patch_is_in_force() -> None:
    def line(needed: bool, applied: bool) -> str:
        return str(compat.Record("name", "module", "Reason.", needed, applied))

    assert line(True, True) == "name (module): applied. Reason."
    assert line(True, False) == "name (module): needed, waits for the import. Reason."
    assert line(False, False) == "name (module): not needed. Reason."


@PRELUDES
def test_what_is_needed_is_applied_and_nothing_else(prelude: str, tmp_path: Path) -> None:
    code = """
from smorms3_dist import compat
from fresh import import_patched
import_patched()
report = compat.report()
assert [record.name for record in report if record.applied != record.needed] == [], report
"""
    passes(tmp_path, prelude + code)


def test_a_patch_that_is_not_needed_changes_nothing(tmp_path: Path) -> None:
    code = f"""
from smorms3_dist import compat
for patch in compat.PATCHES:
    vars(patch)['is_needed'] = False
import multiprocessing.forkserver, multiprocessing.spawn
{STUBBED_CHAINER}
import chainer.functions.array.pad_sequence as pad
for function in (multiprocessing.spawn.get_preparation_data,
                 multiprocessing.forkserver.ForkServer.ensure_running, pad.PadSequence.forward):
    assert 'smorms3_dist' not in function.__code__.co_filename
# The package itself imports multiprocessing.
assert {{record.name for record in compat.report() if record.applied}} <= {{'start-method'}}
"""
    passes(tmp_path, code)


def test_modules_that_were_imported_first_are_mended_at_once(tmp_path: Path) -> None:
    code = """
import smorms3_dist, numpy as np
applied = {record.module for record in smorms3_dist.compat.report() if record.applied}
needed = {record.module for record in smorms3_dist.compat.report() if record.needed}
assert 'chainer._environment_check' in applied
assert needed - applied == {name for name in needed if name not in sys.modules}
x = chainer.Variable(np.arange(4, dtype=np.float32))
y = chainer.functions.as_strided(x, (3, 2), (1, 1), 0)
y.grad = np.ones((3, 2), dtype=np.float32)
y.backward()
assert x.grad.tolist() == [1, 2, 2, 1]
"""
    passes(tmp_path, WITHOUT_SETUPTOOLS + STUBBED_CHAINER + code)


def test_applying_again_does_nothing_more() -> None:
    before = list(sys.meta_path)
    compat.apply()
    assert sys.meta_path == before
    assert sum(isinstance(finder, Importer) for finder in before) == 1
