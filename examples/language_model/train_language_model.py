"""Trains an LSTM on text, by truncated backpropagation through time, to tell the next word.

    mpirun -n 2 python -m smorms3_dist examples/language_model/train_language_model.py

Gradients are clipped to one norm over the whole model, though each rank has a part of them only.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import Any

import smorms3_dist  # mends Chainer for today's Python and NumPy, so it comes first

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
import text
from chainer import training
from chainer.training import extensions

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common


class LanguageModel(chainer.Chain):
    """Two layers of LSTM, which remember what they have read until `reset_state`."""

    def __init__(self, n_words: int, n_units: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        with self.init_scope():
            self.embed = L.EmbedID(n_words, n_units, chainer.initializers.Normal(0.1))
            self.lstm1 = L.LSTM(n_units, n_units)
            self.lstm2 = L.LSTM(n_units, n_units)
            self.out = L.Linear(n_units, n_words)

    def reset_state(self) -> None:
        self.lstm1.reset_state()
        self.lstm2.reset_state()

    def forward(self, x: Any) -> chainer.Variable:
        """Reads the words of each row of ``x``; gives the scores of what comes after each."""
        words = F.dropout(self.embed(x), self.dropout)
        read = []
        for word in F.separate(words, axis=1):
            h = F.dropout(self.lstm1(word), self.dropout)
            read.append(F.dropout(self.lstm2(h), self.dropout))
        return self.out(F.stack(read, axis=1), n_batch_axes=2)

    def loss(self, x: Any, t: Any) -> chainer.Variable:
        scores = self(x)
        loss = F.softmax_cross_entropy(scores.reshape(-1, scores.shape[-1]), t.ravel())
        chainer.report({"loss": loss}, self)
        return loss


class Windows(chainer.dataset.Iterator):
    """Cuts a text into rows, and gives the next so many words of all of them at a time.

    Args:
        words: The text as numbers, of shape (words,).
        batch_size: The number of rows.
        length: How many words of each row make a batch.
        repeat: Whether to begin again at the end of the rows.
    """

    def __init__(self, words: Any, batch_size: int, length: int, repeat: bool = True) -> None:
        words = np.asarray(words[:], np.int32)
        columns = (len(words) - 1) // batch_size // length * length
        if columns == 0:
            raise ValueError(
                f"{len(words)} words on a rank are too few for {batch_size} rows of {length}: "
                "choose a smaller --batchsize or --bprop-len"
            )
        rows = [words[i : i + batch_size * columns].reshape(batch_size, -1) for i in (0, 1)]
        # An item is a window of all rows.
        self.dataset = [
            list(zip(*(part[:, i : i + length] for part in rows), strict=True))
            for i in range(0, columns, length)
        ]
        self.repeat = repeat
        self.reset()

    def reset(self) -> None:
        self.current_position = self.epoch = 0
        self.is_new_epoch = False
        self.previous_epoch_detail = -1.0

    @property
    def epoch_detail(self) -> float:
        return self.epoch + self.current_position / len(self.dataset)

    def __next__(self) -> list[tuple[np.ndarray, np.ndarray]]:
        if not self.repeat and self.epoch > 0:
            raise StopIteration
        self.previous_epoch_detail = self.epoch_detail
        batch = self.dataset[self.current_position]
        self.current_position = (self.current_position + 1) % len(self.dataset)
        self.is_new_epoch = self.current_position == 0
        self.epoch += self.is_new_epoch
        return batch

    def serialize(self, serializer: Any) -> None:
        for name in ("current_position", "epoch", "is_new_epoch", "previous_epoch_detail"):
            setattr(self, name, serializer(name, getattr(self, name)))


class BPTTUpdater(training.StandardUpdater):
    """Lets the model go on reading where it was, but no gradient flow back across a batch."""

    def update_core(self) -> None:
        optimizer = self.get_optimizer("main")
        batch = self.converter(self.get_iterator("main").next(), self.device)
        loss = optimizer.target.loss(*batch)
        optimizer.target.cleargrads()
        loss.backward()
        loss.unchain_backward()
        optimizer.update()

    def serialize(self, serializer: Any) -> None:
        super().serialize(serializer)
        # What LSTMs remember, Chainer leaves out.
        model = self.get_optimizer("main").target
        rows = len(self.get_iterator("main").dataset[0])
        for lstm in (model.lstm1, model.lstm2):
            child = serializer[f"remembered:{lstm.name}"]
            state = []
            for name, value in (("c", lstm.c), ("h", lstm.h)):
                nothing = np.zeros((rows, lstm.state_size), np.float32)
                state.append(child(name, nothing if value is None else value.array))
            lstm.set_state(*map(chainer.as_variable, state))


def main() -> None:
    args = parse_args()
    comm = chainermn.create_communicator(args.communicator)
    args.device = common.device_of(args, comm)

    # Rank 0 reads the text; each rank trains on a part of it that hangs together.
    words = text.load(args.text) if comm.rank == 0 else None
    if comm.rank == 0 and args.subset:
        words = words._replace(
            train=words.train[: args.subset], validation=words.validation[: args.subset]
        )
    if words is not None:
        counts = len(words.train), len(words.validation), len(words.vocabulary)
        print("{} words to train, {} to validate, {} different".format(*counts), flush=True)
    vocabulary = comm.bcast_obj(words and words.vocabulary)
    train = chainermn.scatter_dataset(words and words.train, comm)
    validation = chainermn.scatter_dataset(words and words.validation, comm)

    make = smorms3_dist.create_multi_node_optimizer
    parts = vocabulary, train, validation
    trainer = fit(args, comm, *parts, make, args.out, args.checkpoint)
    if comm.rank == 0:
        last = trainer.get_extension("LogReport").log[-1]
        print(f"validation perplexity: {last['validation/perplexity']:.1f}")
        model = trainer.updater.get_optimizer("main").target
        print(f"a sample: {sample(model, vocabulary, args.prompt, args.seed)}", flush=True)
    if args.compare:
        common.compare(args, comm, trainer, functools.partial(fit, args, comm, *parts))


def fit(
    args: argparse.Namespace,
    comm: Any,
    vocabulary: list[str],
    train: Any,
    validation: Any,
    create_multi_node_optimizer: common.CreateOptimizer,
    out: str,
    checkpoint: Path | None = None,
) -> training.Trainer:
    """Trains a fresh model, which is the same for the same seed, and returns its trainer."""
    np.random.seed(args.seed + comm.rank)
    model = LanguageModel(len(vocabulary), args.unit, args.dropout)
    model.to_device(args.device)

    # The line that is not ChainerMN's: there, it is chainermn.create_multi_node_optimizer.
    optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(lr=args.lr), comm)
    optimizer.setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(args.clip))

    train_iter = Windows(train, args.batchsize, args.bprop_len)
    updater = BPTTUpdater(train_iter, optimizer, device=args.device)
    trainer = training.Trainer(updater, (args.epoch, "epoch"), out=out)

    # The copy shares the parameters, but remembers other words.
    reader = model.copy()
    evaluator = extensions.Evaluator(
        Windows(validation, 1, args.bprop_len, repeat=False),
        reader,
        device=args.device,
        eval_hook=lambda _: reader.reset_state(),
        eval_func=reader.loss,
    )
    trainer.extend(chainermn.create_multi_node_evaluator(evaluator, comm))
    trainer.extend(extensions.ExponentialShift("lr", args.decay), trigger=(1, "epoch"))
    trainer.extend(extensions.observe_lr())
    common.report(
        trainer,
        comm,
        ["main/loss", "perplexity", "validation/perplexity", "lr"],
        {"loss.png": ["main/loss", "validation/main/loss"]},
        postprocess=add_perplexity,
    )
    common.keep_checkpoints(trainer, checkpoint)

    trainer.run()
    return trainer


def add_perplexity(entry: dict[str, Any]) -> None:
    """Adds to an entry of the log among how many words, as it were, the model has to guess."""
    entry["perplexity"] = math.exp(entry["main/loss"])
    entry["validation/perplexity"] = math.exp(entry["validation/main/loss"])


def sample(model: LanguageModel, vocabulary: list[str], prompt: str, seed: int) -> str:
    """Writes on after a beginning, until a paragraph ends or has fifty words."""
    random = np.random.RandomState(seed)
    words = text.words_of(prompt)[:-1]
    numbers = [vocabulary.index(word) if word in vocabulary else 0 for word in words]
    model.reset_state()
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        while len(words) < 50:
            scores = model(model.xp.array([numbers], np.int32)).array[0, -1]
            scores[0] = -np.inf  # the unknown word
            weights = chainer.backends.cuda.to_cpu(F.softmax(scores[None] / 0.7).array[0])
            numbers = [int(weights.cumsum().searchsorted(random.uniform(0, 0.999)))]
            if vocabulary[numbers[0]] == text.END_OF_PARAGRAPH:
                break
            words.append(vocabulary[numbers[0]])
    return " ".join(words)


def parse_args() -> argparse.Namespace:
    parser = common.parser(
        "Train an LSTM language model with a sharded SMORMS3.", batchsize=10, epoch=15
    )
    parser.add_argument("text", type=Path, nargs="*", help="files; if none, Debian's licences")
    parser.add_argument("--unit", "-u", type=int, default=200, help="units of a layer")
    parser.add_argument("--bprop-len", type=int, default=25, help="words to look back at")
    parser.add_argument("--dropout", type=float, default=0.3, help="ratio of units left out")
    parser.add_argument("--lr", type=float, default=0.005, help="SMORMS3's learning rate")
    parser.add_argument("--decay", type=float, default=0.9, help="of the rate, each epoch")
    parser.add_argument("--clip", type=float, default=5, help="the largest norm of gradients")
    parser.add_argument("--prompt", default="you may", help="what the sample begins with")
    parser.add_argument("--subset", type=int, help="train and validate on so many words only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
