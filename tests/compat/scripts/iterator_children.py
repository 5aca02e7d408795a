"""An ordinary training script: the examples come from the children of a MultiprocessIterator.

Its arguments are start methods. Prints whether the model is what a SerialIterator gives.
"""

import multiprocessing
import sys

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import training


class Data(chainer.dataset.DatasetMixin):
    """Examples that each child computes with Chainer."""

    def __len__(self):
        return 24

    def get_example(self, i):
        x = np.random.RandomState(i).uniform(-1, 1, 6).astype(np.float32)
        return F.tanh(x).array, np.int32(i % 3)


def train(iterator):
    np.random.seed(0)
    model = L.Classifier(L.Linear(6, 3))
    optimizer = chainer.optimizers.SMORMS3().setup(model)
    updater = training.updaters.StandardUpdater(iterator, optimizer)
    training.Trainer(updater, (2, "epoch"), out="result").run()
    iterator.finalize()
    return model.predictor.W.array


if __name__ == "__main__":
    serial = train(chainer.iterators.SerialIterator(Data(), 4, shuffle=False))
    for method in sys.argv[1:]:
        multiprocessing.set_start_method(method, force=True)
        parallel = train(
            chainer.iterators.MultiprocessIterator(Data(), 4, shuffle=False, n_processes=2)
        )
        alike = np.array_equal(serial, parallel)
        print(method, "trained", "alike" if alike else "differently")
