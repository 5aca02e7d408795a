"""An ordinary script whose children train: its argument is the start method."""

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
    multiprocessing.set_start_method(sys.argv[1])
    rates = [0.1, 0.2]
    with multiprocessing.Pool(2) as pool:
        print(
            "trained alike"
            if pool.map(train, rates) == [train(rate) for rate in rates]
            else "trained differently"
        )
