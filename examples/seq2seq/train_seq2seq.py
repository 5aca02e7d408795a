"""Trains a transformer to turn dates as people write them into those of ISO 8601.

    mpirun -n 2 python -m smorms3_dist examples/seq2seq/train_seq2seq.py --dtype mixed16

With ``--dtype mixed16`` the model is float16, and Adam updates fp32 masters of which each rank has
its share. On two ranks that equals ChainerMN, too, unless the sum of two gradients is beyond
float16, in which ChainerMN keeps it. A dynamic loss scale, ``--loss-scale 0``, grows until there
are such: then ChainerMN may leave out a step that is made here.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import smorms3_dist  # mends Chainer for today's Python and NumPy, so it comes first

# isort: split
import chainer
import chainermn
import dates
import numpy as np
from chainer import training
from chainer.training import extensions
from transformer import Transformer

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common


def main() -> None:
    args = parse_args()
    comm = chainermn.create_communicator(args.communicator)
    args.device = common.device_of(args, comm)
    if args.dtype == "mixed16":
        chainer.global_config.dtype = chainer.mixed16

    pairs = dates.load(args.pairs, args.seed) if comm.rank == 0 else (None, None)
    if comm.rank == 0:
        print(f"{len(pairs[0])} dates to train, {len(pairs[1])} to validate", flush=True)
    train = chainermn.scatter_dataset(pairs[0], comm, shuffle=True, seed=args.seed)
    validation = chainermn.scatter_dataset(pairs[1], comm)

    make = smorms3_dist.create_multi_node_optimizer
    trainer = fit(args, comm, train, validation, make, args.out, args.checkpoint)
    if comm.rank == 0:
        show(trainer.updater.get_optimizer("main").target, validation[:5])
        last = trainer.get_extension("LogReport").log[-1]
        print(f"wholly right: {last['validation/main/exact']:.2%}", flush=True)
    if args.compare:
        common.compare(args, comm, trainer, functools.partial(fit, args, comm, train, validation))


def fit(
    args: argparse.Namespace,
    comm: Any,
    train: Any,
    validation: Any,
    create_multi_node_optimizer: common.CreateOptimizer,
    out: str,
    checkpoint: Path | None = None,
) -> training.Trainer:
    """Trains a fresh model, which is the same for the same seed, and returns its trainer."""
    np.random.seed(args.seed + comm.rank)
    lengths = dates.LONGEST, dates.ISO_LENGTH
    model = Transformer(len(dates.ALPHABET), lengths, args.unit, args.heads, args.layers)
    model.to_device(args.device)

    # The line that is not ChainerMN's: there, it is chainermn.create_multi_node_optimizer.
    optimizer = create_multi_node_optimizer(chainer.optimizers.Adam(alpha=args.alpha), comm)
    if args.dtype == "mixed16":
        optimizer.use_fp32_update()
        optimizer.loss_scaling(scale=args.loss_scale or None)
    optimizer.setup(model)

    train_iter = chainer.iterators.SerialIterator(train, args.batchsize)
    validation_iter = chainer.iterators.SerialIterator(
        validation, args.batchsize, repeat=False, shuffle=False
    )
    updater = training.StandardUpdater(
        train_iter, optimizer, device=args.device, loss_func=model.loss
    )
    trainer = training.Trainer(updater, (args.epoch, "epoch"), out=out)

    evaluator = extensions.Evaluator(
        validation_iter, model, device=args.device, eval_func=model.evaluate
    )
    trainer.extend(chainermn.create_multi_node_evaluator(evaluator, comm))
    trainer.extend(extensions.WarmupShift("alpha", 0, args.warmup, args.alpha))
    trainer.extend(extensions.observe_value("alpha", lambda t: optimizer.alpha))
    losses = ["main/loss", "validation/main/loss"]
    common.report(trainer, comm, [*losses, "validation/main/exact", "alpha"], {"loss.png": losses})
    common.keep_checkpoints(trainer, checkpoint)

    trainer.run()
    return trainer


def show(model: Transformer, pairs: Any) -> None:
    """Prints what the model makes of some dates, and what else it should have made."""
    sources, targets = chainer.dataset.concat_examples(pairs)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        results = chainer.backends.cuda.to_cpu(model.translate(model.xp.asarray(sources)))
    for source, target, result in zip(sources, targets, results, strict=True):
        wanted, found = dates.decode(target), dates.decode(result)
        mistake = "" if found == wanted else f"   instead of {wanted}"
        print(f"{dates.decode(source):>{dates.LONGEST}}  ->  {found}{mistake}")


def parse_args() -> argparse.Namespace:
    parser = common.parser("Train a transformer with a sharded Adam.", batchsize=50, epoch=8)
    parser.add_argument("--unit", "-u", type=int, default=64, help="units of a position")
    parser.add_argument("--heads", type=int, default=4, help="of each attention")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder and the decoder")
    parser.add_argument("--alpha", type=float, default=0.001, help="Adam's learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps until it is reached")
    parser.add_argument("--dtype", choices=["float32", "mixed16"], default="float32")
    parser.add_argument(
        "--loss-scale", type=float, default=1024, help="with mixed16; 0 for a dynamic one"
    )
    parser.add_argument("--pairs", type=int, default=20000, help="to train on")
    return parser.parse_args()


if __name__ == "__main__":
    main()
