"""Trains on the CPU and on the GPU that does nothing; prints what the arrays' dtypes are, as JSON.

Each case has two entries, ``cpu`` and ``gpu``: the dtype of each array by name, or the error.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
import null_device  # isort: skip (it comes before CuPy)
import smorms3_dist  # noqa: F401 (the import applies the patches)

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn.nccl
import cupy
import numpy as np
from chainer import optimizer_hooks as hooks
from chainer import optimizers
from chainer.backends import cuda
from training import held

# Without a pool each array begins as zeros, which is what it stays.
cupy.cuda.set_allocator(None)

DTYPES = {"float16": np.float16, "float32": np.float32, "float64": np.float64}
DTYPES["mixed16"] = chainer.mixed16


def dense() -> chainer.Link:
    x_only, drop = (lambda x: x[:, :, 0, 0]), (lambda h: F.dropout(h, 0.3))
    linear = L.Linear(8, 5, nobias=True)
    layers = (x_only, linear, L.BatchNormalization(5), F.tanh, F.sigmoid, drop, L.Linear(5, 4))
    return chainer.Sequential(*layers)


def convolutional() -> chainer.Link:
    return chainer.Sequential(
        *(L.Convolution2D(8, 4, 3, pad=1, nobias=True), L.BatchNormalization(4), F.relu),
        *(lambda h: F.max_pooling_2d(h, 2), L.Convolution2D(4, 4, 3, pad=1, groups=2)),
        *(F.leaky_relu, lambda h: F.average_pooling_2d(h, 2), L.Linear(None, 4)),
    )


class Recurrent(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(10, 6, ignore_label=-1)
            self.lstm = L.LSTM(6, 5)
            self.normal = L.LayerNormalization(5)
            self.stacked = L.NStepLSTM(1, 5, 5, 0.1)
            self.out = L.Linear(5, 4)

    def __call__(self, x: Any) -> Any:
        self.lstm.reset_state()
        for word in x[:, :3, 0, 0].astype("i").T:
            h = self.lstm(self.embed(word))
        h = self.normal(h)
        _, _, ys = self.stacked(None, None, [h[:2], h[2:]])
        return self.out(F.concat(ys, axis=0))


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "cross entropy": F.softmax_cross_entropy,
    "weighted cross entropy": lambda y, t: F.softmax_cross_entropy(
        y, t, class_weight=y.xp.ones(4, y.dtype)
    ),
    "sigmoid": lambda y, t: F.sigmoid_cross_entropy(y, y.xp.zeros(y.shape, "i")),
    "squared": lambda y, t: F.mean_squared_error(y, y * 2),
    "absolute": lambda y, t: F.mean_absolute_error(y, y * 2),
    "huber": lambda y, t: F.sum(F.huber_loss(y, y.array, 1.0)),
    "hinge": F.hinge,
    "divergence": lambda y, t: F.gaussian_kl_divergence(y, y),
    "bernoulli": lambda y, t: F.bernoulli_nll(y.array, y),
    "triplet": lambda y, t: F.triplet(y, y, y * 2),
    "contrastive": lambda y, t: F.contrastive(y, y * 2, t),
    "crf": lambda y, t: F.crf1d(y.xp.zeros((4, 4), y.dtype), [y, y], [t, t]),
    "ctc": lambda y, t: F.connectionist_temporal_classification([y, y], y.xp.ones((4, 1), "i"), 0),
    "negative sampling": lambda y, t: F.negative_sampling(
        y, t, y.xp.zeros((6, 4), y.dtype), lambda shape: y.xp.zeros(shape, "i"), 3
    ),
}

NAMES = "AMSBound AMSGrad AdaBound AdaDelta AdaGrad Adam AdamW CorrectedMomentumSGD MSVAG"
NAMES += " MomentumSGD NesterovAG RMSpropGraves SGD SMORMS3"
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    name: getattr(optimizers, name) for name in NAMES.split()
}
OPTIMIZERS["RMSprop"] = functools.partial(optimizers.RMSprop, eps=1e-4)
# As a scheduler computes them: a scalar of NumPy makes no array wider, either.
OPTIMIZERS["NumPy scalars"] = functools.partial(optimizers.Adam, alpha=np.float64(0.1))

HOOKS = (
    hooks.WeightDecay(0.1),
    hooks.Lasso(0.1),
    hooks.GradientClipping(np.float64(1)),
    hooks.GradientHardClipping(-1, 1),
    hooks.GradientNoise(0.1),
    hooks.GradientLARS(),
)


def train(
    gpu: bool,
    dtype: Any,
    make_model: Callable[[], Any] = dense,
    make_optimizer: Callable[[], Any] = optimizers.SMORMS3,
    loss: Callable[[Any, Any], Any] = F.softmax_cross_entropy,
    with_hooks: bool = False,
    communicator: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, str]:
    """Trains for three steps; returns the dtypes of all that a model and its rules hold."""
    chainer.global_config.dtype = dtype
    model = make_model()
    x = np.zeros((4, 8, 8, 8), np.float16 if dtype is chainer.mixed16 else dtype)
    t = np.zeros(4, np.int32)
    if gpu:
        model.to_gpu()
        x, t = cuda.to_gpu(x), cuda.to_gpu(t)
    optimizer = make_optimizer()
    if dtype is chainer.mixed16:
        optimizer.use_fp32_update()
        optimizer.loss_scaling(scale=128.0)
    if communicator is not None:
        name = "pure_nccl" if gpu else "naive"
        comm = chainermn.create_communicator(name, **(communicator if gpu else {}))
        optimizer = chainermn.create_multi_node_optimizer(optimizer, comm, **options)
    optimizer.setup(model)
    for hook in HOOKS if with_hooks else ():
        optimizer.add_hook(hook)
    for _ in range(3):
        y = model(x)
        value = loss(y, t)
        optimizer.update(lambda value=value: value)
    if communicator is not None:
        comm.finalize()
    if gpu:
        assert isinstance(value.array, cupy.ndarray)
    arrays = held(model) | {"y": y, "loss": value}
    return {name: str(getattr(array, "dtype", type(array))) for name, array in arrays.items()}


class Nccl:
    """In place of an NCCL communicator; NCCL is not called."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, ranks: int, unique_id: Any, rank: int) -> None:
        assert unique_id == chainermn.nccl.get_unique_id.unique_id
        assert (ranks, rank) == (1, 0)

    def bcast(self, buffer: int, count: int, dtype: int, root: int, stream: int) -> None:
        assert buffer and root == 0
        self.calls.append(("bcast", int(count), dtype))

    def allReduce(
        self, source: int, target: int, count: int, dtype: int, operation: int, stream: int
    ) -> None:
        assert source and target and operation == chainermn.nccl.NCCL_SUM
        self.calls.append(("allReduce", int(count), dtype))

    def destroy(self) -> None:
        self.calls.append(("destroy",))


def cases() -> Iterator[tuple[str, Callable[[bool], dict[str, str]]]]:
    for name, dtype in DTYPES.items():
        case = functools.partial(train, dtype=dtype)
        for model in (dense, convolutional, Recurrent):
            yield f"{model.__name__} {name}", functools.partial(case, make_model=model)
        for key, optimizer in OPTIMIZERS.items():
            yield f"{key} {name}", functools.partial(case, make_optimizer=optimizer)
        for key, loss in LOSSES.items():
            yield f"{key} {name}", functools.partial(case, loss=loss)
        yield f"hooks {name}", functools.partial(case, with_hooks=True)
        for reduced in (None, np.float16, np.float32):
            over_nccl = functools.partial(case, communicator={"allreduce_grad_dtype": reduced})
            yield f"pure_nccl {name} {reduced and reduced.__name__}", over_nccl


def main() -> None:
    get_unique_id = chainermn.nccl.get_unique_id

    def unique_id() -> Any:
        unique_id.unique_id = get_unique_id()
        return unique_id.unique_id

    chainermn.nccl.get_unique_id = unique_id
    chainermn.nccl.NcclCommunicator = Nccl
    result: dict[str, Any] = {}
    for name, case in cases():
        result[name] = {}
        Nccl.calls.clear()
        for place in ("cpu", "gpu"):
            try:
                result[name][place] = case(place == "gpu")
            except Exception as error:
                result[name][place] = {"error": f"{type(error).__name__}: {error}"}
        result[name]["nccl"] = list(Nccl.calls)
    print(json.dumps({"cases": result, "kernels": sorted(set(null_device.launched))}))
    null_device.leave()


if __name__ == "__main__":
    main()
