"""An ordinary ChainerMN script: all ranks train on the batches of rank 0."""

import chainer
import chainer.links as L
import chainermn
import numpy as np

comm = chainermn.create_communicator("naive")
np.random.seed(0)
inputs = np.random.uniform(-1, 1, (20, 6)).astype(np.float32)
labels = np.random.randint(0, 3, 20).astype(np.int32)
pairs = chainer.datasets.TupleDataset(inputs, labels)
iterator = chainermn.iterators.create_multi_node_iterator(
    chainer.iterators.SerialIterator(pairs, 5, shuffle=True), comm
)
model = L.Classifier(L.Linear(6, 3))
optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm).setup(model)
updater = chainer.training.updaters.StandardUpdater(iterator, optimizer)
chainer.training.Trainer(updater, (3, "epoch"), out="result").run()
results = comm.gather_obj((iterator.epoch, updater.iteration, model.predictor.W.array.tolist()))
if comm.rank == 0:
    assert results[0] == results[1] and results[0][:2] == (3, 12), results
    print("all ranks agree")
