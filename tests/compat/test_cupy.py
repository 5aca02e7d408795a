"""Chainer and ChainerMN on CuPy, as far as that can be seen without a GPU: see `null_device`.

The tests that need CuPy run where one of its wheels is installed; ``cupy.sh`` installs it for them.
"""

from __future__ import annotations

import json
import types
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from smorms3_dist.compat.cupy_patches import CUPY_PATCHES, unpack_params

import numpy as np
import pytest
from fresh import NULL_DEVICE, passes, run, run_code, run_ranks, succeed
from test_patches import CHECK_NEEDED, WITH, WITHOUT, needed

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "cupy"

needs_cupy = pytest.mark.skipif(
    PathFinder.find_spec("cupy") is None, reason="CuPy is not installed: see tests/compat/cupy.sh"
)

NAMES = [patch.name for patch in CUPY_PATCHES]

# What each patch makes work. Those that launch kernels do it on the device that does nothing.
USES = {
    "cudnn-warning": """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import chainer
    chainer.backends.cuda.check_cuda_available()
assert chainer.backends.cuda.available
from importlib.util import find_spec
advised = any('Please reinstall CuPy' in str(warning.message) for warning in caught)
assert not advised or find_spec('cupy.cudnn'), 'CuPy cannot have cuDNN'
""",
    "batched-copy-half": """
import chainermn
from chainermn.communicators import _memory_utility
for make in (_memory_utility._cupy_batched_pack_params,
             _memory_utility._cupy_batched_unpack_params):
    kernel = make()
    kernel.compile()
    assert kernel is make() and kernel.name == make.__name__.lstrip('_')
""",
    "unpack-params-copy": """
import chainer, cupy, numpy as np
from chainermn.communicators import _memory_utility
buffer = _memory_utility.DeviceMemory()
buffer.assign(16)
params = [chainer.Parameter(cupy.asarray(np.arange(4, dtype='f')))]
_memory_utility.pack_params(params, 'data', buffer, np.dtype('f'), False)
params[0].array[...] = 0
_memory_utility.unpack_params(params, 'data', buffer, np.dtype('f'), False)
assert params[0].array.get().tolist() == [0, 1, 2, 3]
_memory_utility.unpack_params(params, 'data', buffer, np.dtype('e'), False)
assert params[0].dtype == np.float32
""",
    "parallel-updater-half": """
import chainer, numpy as np
from chainer.training.updaters import multiprocess_parallel_updater as updater
link = chainer.links.Linear(3, 2)
link.to_gpu()
gathered = updater.gather_params(link)
updater.scatter_params(link, gathered)
assert gathered.shape == (8,) and gathered.dtype == np.float32
assert {'_memcpy_gather', '_memcpy_scatter'} <= set(null_device.launched)
""",
    "negative-sampling-half": """
import chainer, cupy
for dtype in 'efd':
    x, W = (chainer.Variable(cupy.zeros(shape, dtype)) for shape in ((4, 5), (6, 5)))
    t = cupy.zeros(4, 'i')
    loss = chainer.functions.negative_sampling(x, t, W, lambda shape: cupy.zeros(shape, 'i'), 3)
    loss.backward()
    assert x.grad.dtype == W.grad.dtype == dtype
assert 'negative_sampling_calculate_gw' in null_device.launched
""",
    "hierarchical-softmax-half": """
import chainer, cupy, numpy as np
from chainer.links.loss import hierarchical_softmax
hierarchical_softmax.cuda.to_cpu = lambda length: np.array(2, 'i')  # which a kernel computes
for dtype in 'efd':
    with chainer.using_config('dtype', np.dtype(dtype)):
        link = chainer.links.BinaryHierarchicalSoftmax(3, ((0, 1), (2, 3)))
    link.to_gpu()
    loss = link(chainer.Variable(cupy.zeros((4, 3), dtype)), cupy.zeros(4, 'i'))
    loss.backward()
    assert link.W.grad.dtype == dtype
assert 'binary_hierarchical_softmax_bwd' in null_device.launched
""",
}


def on_null_device(code: str) -> str:
    return f"{NULL_DEVICE}{code}\nnull_device.leave()\n"


@pytest.fixture(autouse=True)
def _kernel_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(CACHE))


@needs_cupy
@pytest.mark.parametrize("name", NAMES)
def test_it_works_with_the_patch_if_that_is_needed(name: str, tmp_path: Path) -> None:
    check = CHECK_NEEDED.format(name=name, needed=needed(name))
    passes(tmp_path, on_null_device(WITH + USES[name] + check))


@needs_cupy
@pytest.mark.parametrize("name", NAMES)
def test_it_fails_without_the_patch_only_if_that_is_needed(name: str, tmp_path: Path) -> None:
    code = on_null_device(WITHOUT.format(name=name) + USES[name])
    status, output = run_code(tmp_path, code)
    assert (status != 0) == needed(name), output


def test_every_patch_has_a_use_here_and_is_not_needed_without_cupy() -> None:
    assert sorted(USES) == sorted(NAMES)
    assert PathFinder.find_spec("cupy") or not any(map(needed, NAMES))


def test_a_directory_that_is_called_cupy_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "cupy").mkdir()
    code = """
import sys
sys.path = [path for path in sys.path if 'site-packages' not in path]
from smorms3_dist.compat.cupy_patches import CUPY_PATCHES
assert not any(patch.needed() for patch in CUPY_PATCHES)
"""
    succeed(tmp_path, code)


@pytest.mark.parametrize("transferred", ["e", "f", "d"])
def test_unpacked_parameters_are_what_was_packed(transferred: str) -> None:
    random = np.random.RandomState(0)
    values = [
        random.rand(3, 2).astype("f"),
        np.asfortranarray(random.rand(2, 3).astype("f")),
        random.rand(4).astype("e"),
        np.asfortranarray(random.rand(2, 2)),
    ]
    targets = [np.zeros_like(value) for value in values]
    params = [types.SimpleNamespace(xp=np, data=t, grad=t) for t in targets]
    params[-1].grad = None
    memory = b"".join(value.astype(transferred).ravel("K").tobytes() for value in values)

    def to_device(array: np.ndarray, size: int, offset: int, stream: Any) -> None:
        flat = array.ravel("K")
        assert np.shares_memory(flat, array) and flat.nbytes == size
        flat[...] = np.frombuffer(memory, array.dtype, array.size, offset)

    # In place of ChainerMN's buffer on a device.
    buffer = types.SimpleNamespace(to_device=to_device)
    unpack_params(params, "grad", buffer, np.dtype(transferred), True)
    assert all(param.grad is target for param, target in zip(params[:3], targets[:3], strict=True))
    for param, value in zip(params, values, strict=True):
        assert param.grad.dtype == value.dtype
        np.testing.assert_array_equal(param.grad, value.astype(transferred).astype(value.dtype))


UPDATE = """
import cupy, numpy as np
from cupy.cuda import nvrtc
from smorms3_dist.kernels.cuda import CupyLauncher
from smorms3_dist.kernels.chainer_rules import SMORMS3
from smorms3_dist.kernels.tables import Arrays, Rates, Run, UpdateTable
compiled, compile_program = [], nvrtc.compileProgram
def count(program, options):
    compiled.append(options)
    compile_program(program, options)
nvrtc.compileProgram = count
launcher = CupyLauncher()
table = UpdateTable(launcher, SMORMS3, [Run(0, 0, 0, 100)])
table.set_rates([Rates((1, 1e-3, 1e-16))])
param, grad, *states = (cupy.zeros(100, 'f') for _ in range(5))
table.update(Arrays(param, grad, states))
name, = [name for name in null_device.launched if 'update' in name]
assert name.startswith('_Z6updateI7Smorms3fff'), name
print('compiled', len([options for options in compiled if '--ftz=false' in options]))
"""


@needs_cupy
def test_the_kernels_are_compiled_by_the_first_process_that_launches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    assert run_code(tmp_path, on_null_device(UPDATE), "-W", "ignore") == (0, "compiled 1\n")
    assert run_code(tmp_path, on_null_device(UPDATE), "-W", "ignore") == (0, "compiled 0\n")
    kernels = (tmp_path / "cache").glob("smorms3_dist-*.cubin")
    assert [b"_Z6updateI7Smorms3fff" in kernel.read_bytes() for kernel in kernels] == [True]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # With an empty cache of kernels, it compiles more than 200 of them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_CACHE_DIR", str(CACHE))
        patch.setenv("CHAINER_CUDNN", "0")  # which CuPy 13 can have, but need not
        script = HERE / "scripts" / "on_null_device.py"
        folder = tmp_path_factory.mktemp("training")
        status, output = run(folder, "-W", "ignore", script, limit=400)
    assert status == 0, output
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


@needs_cupy
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "mixed16"])
def test_a_gpu_trains_with_the_dtypes_of_a_cpu(dtype: str, record: dict[str, Any]) -> None:
    cases = {name: case for name, case in record["cases"].items() if dtype in name.split()}
    assert len(cases) >= 35
    for name, case in cases.items():
        assert "error" not in case["gpu"] and case["gpu"] == case["cpu"], name


@needs_cupy
@pytest.mark.slow
def test_pure_nccl_broadcasts_and_averages_all_elements_in_the_dtype_asked_for(
    record: dict[str, Any],
) -> None:
    expected = {"cupy_batched_pack_params", "cupy_batched_unpack_params", "div_by_size"}
    expected |= {"bn_fwd", "bn_bwd", "im2col", "col2im", "lstm_fwd", "lstm_bwd", "smorms3"}
    assert expected <= set(record["kernels"])
    types = {"float16": 6, "float32": 7, "float64": 8, "mixed16": 6}
    cases = [(name, case) for name, case in record["cases"].items() if "pure_nccl" in name]
    assert len(cases) == 12
    for name, case in cases:
        _, own, reduced = name.split()
        count = 8 * 5 + 2 * 5 + 5 * 4 + 4
        average = ["allReduce", count, types[own if reduced == "None" else reduced]]
        assert case["nccl"] == [["bcast", count, types[own]], average, average, ["destroy"]], name


@needs_cupy
@pytest.mark.slow
@pytest.mark.parametrize("how", ["nccl", "staged"])
def test_sharded_steps_call_cupy_as_it_wants_to_be_called(tmp_path: Path, how: str) -> None:
    script = HERE / "scripts" / "steps_on_null_device.py"
    status, output = run(tmp_path, "-W", "ignore", script, how, limit=400)
    assert status == 0, output
    cases = json.loads(output.splitlines()[-1])
    assert len(cases) >= 12
    collectives = {"nccl": "NcclCollectives", "staged": "ThroughHostCollectives"}[how]
    for name, result in cases.items():
        assert result == collectives, f"{name}: {result}"


@needs_cupy
@pytest.mark.mpi
def test_the_unique_id_of_nccl_reaches_all_ranks(tmp_path: Path) -> None:
    """Up to the communicator of NCCL itself, which needs a driver."""
    script = tmp_path / "script.py"
    script.write_text(f"""{NULL_DEVICE}
import smorms3_dist, chainermn, chainermn.nccl
from chainermn.communicators import _communication_utility
made = []
chainermn.nccl.NcclCommunicator = lambda *arguments: made.append(arguments)
comm = chainermn.create_communicator('pure_nccl')
comm._init_comms()
(size, unique_id, rank), = made
ids = comm.gather_obj(unique_id)
if comm.rank == 0:
    assert ids == [unique_id] * 2 and len(unique_id) == 128, ids
assert (size, rank) == (2, comm.rank)
assert comm.mpi_comm.allreduce(1) == 2
if comm.rank == 0:
    print('both ranks have it')
comm.mpi_comm.barrier()
from mpi4py import MPI
MPI.Finalize()
null_device.leave()
""")
    status, output = run_ranks(tmp_path, "-W", "ignore", script)
    assert status == 0 and "both ranks have it" in output, output
