"""Makes sharded steps, snapshots and checkpoints on the GPU that does nothing, with the real CuPy.

Values mean nothing there; that everything is called as CuPy wants it to be called, and that all
kernels compile, does. Prints, as JSON, the collectives that each case has used, or its error.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
import null_device  # isort: skip (it comes before CuPy)
import smorms3_dist
from smorms3_dist.collectives import connect as collectives

import chainer
import cupy
import fake_nccl
import models
import numpy as np
from chainer import optimizer_hooks as hooks
from chainer import optimizers, serializers
from cupy.lib import stride_tricks
from rank_threads import Meeting, ThreadCollectives, run_ranks

# Without a pool each array begins as zeros, which is what it stays.
cupy.cuda.set_allocator(None)
# The device's memory is host memory: NCCL between threads works on its pointers.
cupy.cuda.nccl.NcclCommunicator = fake_nccl.NcclCommunicator
if "staged" in sys.argv:
    collectives._without_nccl = lambda host, places: "the test wants it so"
else:
    # Both GPUs have one address.
    collectives._without_nccl = lambda host, places: None
warnings.simplefilter("ignore")
np.seterr(all="ignore")


def train(
    configure: Callable[[Any], None] = lambda optimizer: None,
    kind: Any = optimizers.SMORMS3,
    dtypes: dict[str, str] | None = None,
    device: str = "@cupy:0",
    **options: Any,
) -> Any:
    link = models.Model(dtypes=dtypes)
    link.to_device(device)
    link.cleargrads()
    alone = ThreadCollectives(0, Meeting(1, 60.0))
    optimizer = smorms3_dist.create_multi_node_optimizer(kind(), alone, **options).setup(link)
    configure(optimizer)
    optimizer.update()
    for step in (1, 2):
        set_gradients(optimizer, step)
        optimizer.update()
    assert optimizer.t == 2 - optimizer.double_buffering
    return optimizer


def set_gradients(optimizer: Any, step: int) -> None:
    for name, param in optimizer.target.namedparams():
        param.grad = param.device.send(models.gradient(name, param, 0, step))
        param._loss_scale = optimizer._loss_scale


def fusible(optimizer: Any) -> None:
    optimizer.add_hook(hooks.GradientClipping(0.5))
    optimizer.add_hook(hooks.WeightDecay(0.1))
    optimizer.target.g.update_rule.add_hook(hooks.WeightDecay(0.01))


def all_hooks(optimizer: Any) -> None:
    for hook in (
        hooks.GradientLARS(),
        hooks.GradientHardClipping(-0.5, 0.5),
        hooks.GradientNoise(0.1),
        hooks.Lasso(0.1),
        hooks.GradientClipping(0.5),
    ):
        optimizer.add_hook(hook)
    optimizer.target.g.update_rule.add_hook(hooks.Lasso(0.01))
    optimizer.target.e.update_rule.add_hook(hooks.GradientLARS())


def dynamic(optimizer: Any) -> None:
    optimizer.loss_scaling()
    optimizer.use_fp32_update()


def resume(**options: Any) -> Any:
    optimizer = train(fusible, **options)
    with tempfile.TemporaryDirectory() as directory:
        smorms3_dist.save_checkpoint(directory, optimizer)
        smorms3_dist.load_checkpoint(directory, optimizer)
    saved = serializers.npz.serialize(optimizer)
    serializers.NpzDeserializer(saved).load(optimizer)
    optimizer.consolidate()
    set_gradients(optimizer, 3)
    optimizer.update()
    optimizer.check_sync()
    return optimizer


class OwnRule(chainer.UpdateRule):
    """A user's own, with a kernel of its own."""

    is_elementwise = True

    def init_state(self, param: Any) -> None:
        self.state["v"] = param.device.xp.zeros_like(param.data)

    def update_core_gpu(self, param: Any) -> None:
        kernel = cupy.ElementwiseKernel(
            "T grad", "T param, T v", "v += grad; param -= v", "own_rule"
        )
        kernel(param.grad, param.data, self.state["v"])


def own_code() -> Any:
    """Twice, on runs of all parameters but the one without axes."""
    optimizer = train(kind=lambda: models.OwnOptimizer(OwnRule))
    assert null_device.launched.count("own_rule") == 2 * 3, null_device.launched
    return optimizer


def elsewhere() -> Any:
    """All on the other GPU than the current one, which stays that."""
    optimizer = resume(device="@cupy:1", double_buffering=True)
    for twin in optimizer, copy.deepcopy(optimizer):
        for group in twin.sharded_model.groups:
            arrays = [group.buffers.flat, *group.states.values()]
            arrays += [param.array for param in twin.target.params()]
            assert {array.device.id for array in arrays} == {1}
    assert null_device.current() == 0
    return optimizer


def overlapped() -> Any:
    """Two ranks with a GPU each, which reduce during the backward pass."""

    def run(comm: ThreadCollectives) -> Any:
        link = models.Model(dtypes=HALF)
        link.to_device(f"@cupy:{comm.rank}")
        make = smorms3_dist.create_multi_node_optimizer
        optimizer = make(optimizers.SMORMS3(), comm, overlap=True).setup(link)
        fusible(optimizer)
        optimizer.use_fp32_update()
        for step in range(4):
            optimizer.update(models.loss_with_gradients, link, comm.rank, step)
        assert optimizer._overlap.early is None and optimizer._overlap.has_order
        assert optimizer._overlap._channel._reduced is not None
        return optimizer

    return run_ranks(2, run)[0]


def gathered() -> Any:
    """Two ranks with a GPU each, which gather parameters beside the next forward pass."""

    def run(comm: ThreadCollectives) -> Any:
        link = models.Model()
        link.to_device(f"@cupy:{comm.rank}")
        make = smorms3_dist.create_multi_node_optimizer
        optimizer = make(optimizers.SMORMS3(), comm, overlap_gather=True).setup(link)
        for name, hold in HOLDERS.items():
            held: list[Any] = []
            for step in range(2):
                optimizer.update(models.loss_with_gradients, link, comm.rank, step)
                array = link.g.array
                with array.device:
                    held.append(hold(array))
                del array
                last = optimizer._overlap_gather._last
                assert (last is None) == (name == "nobody" and step == 0)
                # Each is seen by the update after it.
                expected = [] if name == "nobody" else ["/g"]
                assert not step or last.held == expected, (name, last.held)
            held.clear()
        copy.deepcopy(optimizer)
        return optimizer

    return run_ranks(2, run)[0]


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "nobody": lambda array: None,
    "array": lambda array: array,
    "view": lambda array: array[1:],
    "transposed": lambda array: array[1:].T,
    "split": lambda array: cupy.split(array, [1]),
    "as_strided": lambda array: stride_tricks.as_strided(array, (2, 2), (4, 4)),
    "as_strided of a view": lambda array: stride_tricks.as_strided(array[1:], (2, 2), (4, 4)),
    "sliding windows": lambda array: stride_tricks.sliding_window_view(array, (2, 2)),
    "pointer": lambda array: array.data,
    "pointer into it": lambda array: array.data + 4,
    "memory": lambda array: array.data.mem,
    "DLPack": lambda array: array.__dlpack__(),
    "from DLPack": cupy.from_dlpack,
}
HALF = {"a": "float16", "g": "float16"}
CASES: dict[str, Callable[[], Any]] = {
    "plain": train,
    "fused hooks": lambda: train(fusible),
    "dynamic": lambda: train(dynamic, dtypes=HALF),
    "dynamic and clipped": lambda: train(lambda o: (dynamic(o), fusible(o)), dtypes=HALF),
    "exact": lambda: train(fusible, exact=True),
    "all hooks": lambda: train(all_hooks),
    "all hooks, half": lambda: train(lambda o: (dynamic(o), all_hooks(o)), dtypes=HALF),
    "replicated": lambda: train(all_hooks, gradients="replicated"),
    "Adam": lambda: train(kind=optimizers.Adam),
    "MSVAG": lambda: train(kind=optimizers.MSVAG),
    "AdaDelta, replicated": lambda: train(kind=optimizers.AdaDelta, gradients="replicated"),
    "own code of a rule": own_code,
    "snapshots and checkpoints": resume,
    "on another GPU": elsewhere,
}
if "staged" not in sys.argv:
    for dtype in ("float16", "bfloat16"):
        CASES[dtype] = lambda dtype=dtype: train(fusible, communication_dtype=dtype)
    CASES["during the backward pass"] = overlapped
    CASES["beside the forward pass"] = gathered

results = {}
for name, case in CASES.items():
    try:
        results[name] = type(case().collectives).__name__
    except Exception:  # whatever it is, it is the result
        results[name] = traceback.format_exc()
print(json.dumps(results))
null_device.leave()
