"""An ordinary script whose children train: its arguments are start methods."""

import multiprocessing
import sys

import chainer
import chainer.links as L
import numpy as np


def train(rate):
    np.random.seed(0)
    model = L.Classifier(L.Linear(4, 2))
    optimizer = chainer.optimizers.Adam(rate).setup(model)
    for _ in range(3):
        optimizer.update(model, np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1], np.int32))
    return model.predictor.W.array.tolist()


if __name__ == "__main__":
    rates = [0.1, 0.2]
    for method in sys.argv[1:]:
        with multiprocessing.get_context(method).Pool(2) as pool:
            alike = pool.map(train, rates) == [train(rate) for rate in rates]
        print(method, "trained", "alike" if alike else "differently")
