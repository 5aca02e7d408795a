"""Chainer's own layers on a GPU: losses beside those on the CPU; 1 if they differ."""

import sys

import smorms3_dist  # noqa: F401

import chainer
import cupy
import numpy as np
from chainer import functions as F
from chainer import links as L

UPDATES = 5


class Dense(chainer.Sequential):
    """Matrix products."""

    shape, dtype = (8, 30), np.float32

    def __init__(self) -> None:
        super().__init__(L.Linear(50), F.tanh, L.Linear(50), F.sigmoid, L.Linear(5))


class Convolutional(chainer.Sequential):
    """Convolutions of all kinds, pooling and batch normalization; CuPy 14 has no cuDNN for them."""

    shape, dtype = (8, 3, 8, 8), np.float32

    def __init__(self) -> None:
        super().__init__(
            L.Convolution2D(8, 3, pad=1),
            L.BatchNormalization(8),
            F.relu,
            L.Convolution2D(8, 8, 3, pad=1, groups=2),
            lambda x: F.max_pooling_2d(x, 2),
            L.Deconvolution2D(8, 4, 2, stride=2),
            lambda x: F.average_pooling_2d(F.leaky_relu(x), 2),
            L.Linear(5),
        )


class Recurrent(chainer.Chain):
    """Embedded words, LSTMs and layer normalization."""

    shape, dtype = (8, 4), np.int32

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.words = L.EmbedID(20, 6)
            self.lstm = L.LSTM(6, 7)
            self.normal = L.LayerNormalization(7)
            self.several = L.NStepLSTM(1, 7, 7, 0.0)
            self.out = L.Linear(7, 5)

    def forward(self, x):
        self.lstm.reset_state()
        for word in F.transpose(x):
            state = self.lstm(self.words(word))
        state = self.normal(state)
        _, _, states = self.several(None, None, [state[:4], state[4:]])
        return self.out(F.concat(states, axis=0))


def losses(make: type[chainer.Link], gpu: bool) -> list[float]:
    rng = np.random.RandomState(0)
    x = (rng.standard_normal(make.shape) * 3).astype(make.dtype)
    if make.dtype == np.int32:
        x = abs(x)
    t = np.arange(len(x), dtype=np.int32) % 5
    np.random.seed(3)
    model = make()
    model(x)
    if gpu:
        model.to_device("@cupy:0")
        x, t = cupy.asarray(x), cupy.asarray(t)
    optimizer = chainer.optimizers.SMORMS3(lr=0.01).setup(model)
    found = []
    for _ in range(UPDATES):
        loss = F.softmax_cross_entropy(model(x), t)
        model.cleargrads()
        loss.backward()
        optimizer.update()
        found.append(float(loss.array))
    return found


failed = 0
for make in (Dense, Convolutional, Recurrent):
    expected, ours = losses(make, gpu=False), losses(make, gpu=True)
    difference = max(abs(a - b) for a, b in zip(expected, ours, strict=True))
    good = difference < 1e-3 and expected[-1] < expected[0]
    failed |= not good
    print(
        f"{make.__name__:15} {'ok' if good else 'FAILED'}: differ by {difference:.1e}: {ours}",
        flush=True,
    )
sys.exit(failed)
