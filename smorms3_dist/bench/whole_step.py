"""Program: whole training steps by phase, and the page faults in each.

A ConvNet takes images of 32 x 32 in batches of 64, an LSTM 20 words of each of 16 sentences. Of
this project's update, what reduces and updates and what gathers are phases of their own; the rest
is the work of Python and what ranks agree on.
"""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable
from typing import Any

from smorms3_dist.bench import clock, ranks_of_mpi
from smorms3_dist.optimizer.factory import create_multi_node_optimizer
from smorms3_dist.sharding.sharded_model import ShardedModel

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np

WORDS, SENTENCE = 5000, 20


class ConvNet(chainer.Chain):
    """Two convolutions and two linear layers."""

    inputs = np.random.RandomState(0).standard_normal((64, 3, 32, 32)).astype(np.float32)

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(3, 32, 3, pad=1)
            self.conv2 = L.Convolution2D(32, 64, 3, pad=1)
            self.fc1 = L.Linear(64 * 8 * 8, 512)
            self.fc2 = L.Linear(512, 10)

    def forward(self, x: np.ndarray) -> chainer.Variable:
        """Gives the loss of images that are all of the first class."""
        h = F.max_pooling_2d(F.relu(self.conv1(x)), 2)
        h = F.max_pooling_2d(F.relu(self.conv2(h)), 2)
        h = self.fc2(F.relu(self.fc1(h)))
        return F.softmax_cross_entropy(h, np.zeros(len(x), np.int32))


class LanguageModel(chainer.Chain):
    """An LSTM over embedded words that foretells the next word."""

    inputs = np.random.RandomState(0).randint(0, WORDS, (16, SENTENCE + 1)).astype(np.int32)

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(WORDS, 256)
            self.lstm = L.LSTM(256, 512)
            self.words = L.Linear(512, WORDS)

    def forward(self, x: np.ndarray) -> chainer.Variable:
        """Gives the mean loss over the words of sentences."""
        self.lstm.reset_state()
        losses = [
            F.softmax_cross_entropy(self.words(self.lstm(self.embed(x[:, i]))), x[:, i + 1])
            for i in range(SENTENCE)
        ]
        return sum(losses[1:], losses[0]) / SENTENCE


MODELS: dict[str, Any] = {"ConvNet": ConvNet, "LSTM": LanguageModel}

_PARTS = {"reduce": "reduce and update", "gather": "gather"}
"""Methods of `ShardedModel` that are phases, and what these are called."""


class _Inside:
    """Times methods of all sharded models, from inside of an update."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(_PARTS.values(), 0.0)
        for name, phase in _PARTS.items():
            setattr(ShardedModel, name, self._timed(getattr(ShardedModel, name), phase))

    def _timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*arguments: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments, **more)
            finally:
                self.seconds[phase] += time.perf_counter() - start

        return timed


def main() -> None:
    """Measures, as one of the ranks that mpirun has started."""
    parser = clock.arguments()
    parser.add_argument("--system", choices=("smorms3_dist", "chainermn", "chainer"), required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    options = parser.parse_args()
    clock.end_after(options.limit)
    communicator = ranks_of_mpi.communicator(options.ranks)
    ranks = ranks_of_mpi.ranks(communicator)
    model = MODELS[options.model]()
    optimizer = chainer.optimizers.SMORMS3()
    inside = _Inside() if options.system == "smorms3_dist" else None
    if inside is not None:
        optimizer = create_multi_node_optimizer(optimizer, communicator)
    elif options.system == "chainermn":
        optimizer = chainermn.create_multi_node_optimizer(optimizer, communicator)
    optimizer.setup(model)
    timed = clock.Clock(ranks)
    faults: list[int] = []
    of_parts: dict[str, list[float]] = {phase: [] for phase in _PARTS.values()}

    def step() -> None:
        before, loss = _faults(), []
        timed("forward", lambda: loss.append(model(model.inputs)))
        timed("backward", lambda: (model.cleargrads(), loss.pop().backward()))
        if inside is not None:
            inside.seconds = dict.fromkeys(inside.seconds, 0.0)
        timed("update", optimizer.update)
        faults.append(_faults() - before)
        if inside is not None:
            for phase, seconds in inside.seconds.items():
                of_parts[phase].append(seconds)

    for _ in range(clock.WARM_UP_STEPS + 1):
        step()
    faults.clear()
    for times in of_parts.values():
        times.clear()
    timed.repeat(step, options)
    if inside is not None:
        timed.seconds |= of_parts
    seconds = timed.slowest()
    phases = zip(seconds["forward"], seconds["backward"], seconds["update"], strict=True)
    seconds["step"] = list(map(sum, phases))
    everybodys = ranks.gather(sorted(faults)[len(faults) // 2])
    if ranks.rank == 0:
        clock.write(
            options,
            parameters=sum(param.size for param in model.params()),
            seconds=seconds,
            page_faults=max(everybodys),
            versions=ranks_of_mpi.versions(),
        )


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    main()
