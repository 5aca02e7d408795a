"""Trains small models the same way everywhere and prints a record of it as JSON.

The record holds the dtype of every parameter, gradient, optimizer state, persistent value, output
and loss, and of every value the losses and a few numbers that stand for the arrays. Random numbers
come from `numpy.random.RandomState`, whose stream is the same in all versions of NumPy.

    python training.py            with smorms3_dist
    python training.py --plain    without it, for the reference
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--plain" not in sys.argv:
    import smorms3_dist  # noqa: F401

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import training
from chainer.training import extensions

STEPS = 6
BATCH = 8
EXAMPLES = 32

OPTIMIZERS: dict[str, Callable[[], chainer.Optimizer]] = {
    "Adam": lambda: chainer.optimizers.Adam(alpha=0.01),
    "SMORMS3": lambda: chainer.optimizers.SMORMS3(lr=0.01),
}


class Dense(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(12, 16, nobias=True)
            self.bn = L.BatchNormalization(16)
            self.l2 = L.Linear(None, 4)

    def forward(self, x: Any) -> Any:
        return self.l2(F.sigmoid(self.bn(self.l1(x))))


class Convolutional(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.c1 = L.Convolution2D(2, 4, 3, pad=1, nobias=True)
            self.bn = L.BatchNormalization(4)
            self.c2 = L.Convolution2D(None, 6, 3, stride=2)
            self.out = L.Linear(None, 4)

    def forward(self, x: Any) -> Any:
        h = F.max_pooling_2d(F.tanh(self.bn(self.c1(x))), 2)
        return self.out(F.tanh(self.c2(h)))


class Recurrent(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(10, 8)
            self.lstm = L.LSTM(8, 12)
            self.out = L.Linear(12, 4)

    def forward(self, x: Any) -> Any:
        self.lstm.reset_state()
        for column in F.transpose(x) if isinstance(x, chainer.Variable) else x.T:
            h = self.lstm(self.embed(column))
        return self.out(F.dropout(h, 0.2))


MODELS: dict[str, tuple[Callable[[], chainer.Chain], Callable[[np.random.RandomState], Any]]] = {
    "dense": (Dense, lambda random: random.uniform(-1, 1, (EXAMPLES, 12)).astype("f")),
    "convolutional": (
        Convolutional,
        lambda random: random.uniform(-1, 1, (EXAMPLES, 2, 10, 10)).astype("f"),
    ),
    "recurrent": (Recurrent, lambda random: random.randint(0, 10, (EXAMPLES, 5)).astype("i")),
}


def data(name: str) -> Any:
    """The examples of a model: pairs of an input and a label."""
    random = np.random.RandomState(1)
    inputs = MODELS[name][1](random)
    if chainer.config.dtype == chainer.mixed16:
        inputs = inputs.astype(np.float16)
    labels = random.randint(0, 4, EXAMPLES).astype(np.int32)
    return chainer.datasets.TupleDataset(inputs, labels)


def classifier(name: str) -> L.Classifier:
    """A model with a loss, initialized the same way each time."""
    np.random.seed(0)
    return L.Classifier(MODELS[name][0]())


def summary(array: Any) -> list[float]:
    """A few numbers that stand for an array: its norm, its sum and its first and last element."""
    flat = np.asarray(array).astype(np.float64).ravel()
    numbers = np.sqrt((flat * flat).sum()), flat.sum(), flat[0], flat[-1]
    return [float(f"{number:.9g}") for number in numbers]


def held(model: chainer.Link) -> dict[str, Any]:
    """Everything that a model and its update rules hold."""
    arrays: dict[str, Any] = {}
    for name, parameter in sorted(model.namedparams()):
        arrays[name] = parameter.array
        arrays[f"{name} grad"] = parameter.grad
        for key, value in sorted((parameter.update_rule.state or {}).items()):
            arrays[f"{name} {key}"] = value
    for path, link in sorted(model.namedlinks()):
        for key in sorted(link._persistent):
            arrays[f"{path}/{key}"] = getattr(link, key)
    return arrays


def describe(model: chainer.Link) -> tuple[dict[str, str], dict[str, list[float]]]:
    """The dtypes and the summaries of everything that a model and its update rules hold."""
    arrays = held(model)
    dtypes = {name: str(np.asarray(array).dtype) for name, array in arrays.items()}
    return dtypes, {name: summary(array) for name, array in arrays.items()}


def train(name: str, make_optimizer: Callable[[], chainer.Optimizer]) -> dict[str, Any]:
    """Trains by hand, with two hooks, and looks at outputs and losses on the way."""
    model = classifier(name)
    optimizer = make_optimizer().setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-3))
    optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(1.0))
    if chainer.config.dtype == chainer.mixed16:
        optimizer.use_fp32_update()
        optimizer.loss_scaling(scale=128)
    iterator = chainer.iterators.SerialIterator(data(name), BATCH, shuffle=False)
    losses = []
    for _ in range(STEPS):
        inputs, labels = chainer.dataset.concat_examples(iterator.next())
        optimizer.update(model, inputs, labels)
        losses.append(float(model.loss.array))
    dtypes, values = describe(model)
    for key, output in ("output", model.y), ("loss", model.loss), ("accuracy", model.accuracy):
        dtypes[key] = str(output.dtype)
    return {"dtypes": dtypes, "losses": losses, "values": values}


def make_trainer(
    out: str, make_optimizer: Callable[[], chainer.Optimizer], iterator: Any = None
) -> training.Trainer:
    """A trainer of the dense model, for two epochs, with a snapshot after each."""
    model = classifier("dense")
    optimizer = make_optimizer().setup(model)
    if iterator is None:
        order = np.random.RandomState(2)
        iterator = chainer.iterators.SerialIterator(
            data("dense"), BATCH, order_sampler=chainer.iterators.ShuffleOrderSampler(order)
        )
    trainer = training.Trainer(
        training.updaters.StandardUpdater(iterator, optimizer), (2, "epoch"), out
    )
    rate = "alpha" if hasattr(optimizer, "alpha") else "lr"
    trainer.extend(extensions.ExponentialShift(rate, 0.9), trigger=(2, "iteration"))
    evaluation = chainer.iterators.SerialIterator(data("dense"), BATCH, False, False)
    trainer.extend(extensions.Evaluator(evaluation, model))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.snapshot(filename="snapshot_{.updater.epoch}"), trigger=(1, "epoch"))
    return trainer


def train_with_trainer(make_optimizer: Callable[[], chainer.Optimizer]) -> dict[str, Any]:
    """Trains with a Trainer, resumes from its first snapshot and trains to the same end."""
    with tempfile.TemporaryDirectory() as out:
        whole = make_trainer(out, make_optimizer)
        whole.run()
        resumed = make_trainer(out, make_optimizer)
        chainer.serializers.load_npz(Path(out, "snapshot_1"), resumed)
        started_at = resumed.updater.iteration
        resumed.run()
        log = json.loads(Path(out, "log").read_text())
    first, second = (t.updater.get_optimizer("main") for t in (whole, resumed))
    dtypes, values = describe(second.target)
    ours, theirs = (dict(each.target.namedparams()) for each in (first, second))
    same = all(np.array_equal(param.array, theirs[name].array) for name, param in ours.items())
    keys = ("main/loss", "validation/main/loss")
    return {
        "dtypes": dtypes,
        "losses": [entry[key] for entry in log for key in keys],
        "values": values,
        "resumed_at": started_at,
        "ended_at": resumed.updater.iteration,
        "resumed_equals_whole": bool(same),
    }


if __name__ == "__main__":
    record: dict[str, Any] = {}
    for optimizer, make in OPTIMIZERS.items():
        for name in MODELS:
            record[f"{name} {optimizer}"] = train(name, make)
        with chainer.using_config("dtype", chainer.mixed16):
            record[f"dense {optimizer} mixed16"] = train("dense", make)
        record[f"trainer {optimizer}"] = train_with_trainer(make)
    versions = {"numpy": np.__version__, "python": sys.version.split()[0]}
    print(json.dumps({**versions, "trainings": record}, indent=1))
