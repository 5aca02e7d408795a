"""Trains two networks against each other, which draw digits, or pictures of clothes.

    mpirun -n 2 python -m smorms3_dist examples/dcgan/train_dcgan.py

Each of the two has an optimizer of its own, and both are sharded.
"""

from __future__ import annotations

import argparse
import functools
import os
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
from chainer import training

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
from mnist import data

WEIGHTS = chainer.initializers.Normal(0.02)


class Generator(chainer.Chain):
    """Draws pictures of 28 x 28 pixels out of noise."""

    def __init__(self, n_noise: int, channels: int) -> None:
        super().__init__()
        self.n_noise, self.channels = n_noise, channels
        with self.init_scope():
            self.l0 = L.Linear(n_noise, 7 * 7 * channels, initialW=WEIGHTS)
            self.bn0 = L.BatchNormalization(7 * 7 * channels)
            self.dc1 = L.Deconvolution2D(channels, channels // 2, 4, 2, 1, initialW=WEIGHTS)
            self.bn1 = L.BatchNormalization(channels // 2)
            self.dc2 = L.Deconvolution2D(channels // 2, 1, 4, 2, 1, initialW=WEIGHTS)

    def noise(self, count: int, random: Any = np.random) -> Any:
        return self.xp.asarray(random.uniform(-1, 1, (count, self.n_noise)), np.float32)

    def forward(self, noise: Any) -> chainer.Variable:
        h = F.relu(self.bn0(self.l0(noise)))
        h = F.relu(self.bn1(self.dc1(h.reshape(-1, self.channels, 7, 7))))
        return F.sigmoid(self.dc2(h))


class Discriminator(chainer.Chain):
    """Tells pictures of the dataset from the generator's: the more, the likelier a real one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        with self.init_scope():
            self.c0 = L.Convolution2D(1, channels // 2, 4, 2, 1, initialW=WEIGHTS)
            self.c1 = L.Convolution2D(channels // 2, channels, 4, 2, 1, initialW=WEIGHTS)
            self.bn1 = L.BatchNormalization(channels)
            self.l2 = L.Linear(7 * 7 * channels, 1, initialW=WEIGHTS)

    def forward(self, images: Any) -> chainer.Variable:
        h = F.leaky_relu(self.c0(with_noise(images)))
        h = F.leaky_relu(self.bn1(self.c1(with_noise(h))))
        return self.l2(with_noise(h))


def with_noise(x: Any) -> Any:
    """Makes it harder to tell pictures apart, so that the generator can keep up."""
    xp = chainer.backend.get_array_module(x)
    return x + 0.2 * xp.random.standard_normal(x.shape).astype(np.float32)


class DCGANUpdater(training.StandardUpdater):
    """Updates the discriminator, then the generator."""

    def update_core(self) -> None:
        generator = self.get_optimizer("generator")
        discriminator = self.get_optimizer("discriminator")
        real = self.converter(self.get_iterator("main").next(), self.device)
        real = real.reshape(-1, 1, 28, 28)
        seen = discriminator.target(real)
        drawn = discriminator.target(generator.target(generator.target.noise(len(real))))

        def discriminator_loss() -> chainer.Variable:
            loss = (F.sum(F.softplus(-seen)) + F.sum(F.softplus(drawn))) / len(real)
            chainer.report({"loss": loss}, discriminator.target)
            return loss

        def generator_loss() -> chainer.Variable:
            loss = F.sum(F.softplus(-drawn)) / len(real)
            chainer.report({"loss": loss}, generator.target)
            return loss

        discriminator.update(discriminator_loss)
        generator.update(generator_loss)


def main() -> None:
    args = parse_args()
    comm = chainermn.create_communicator(args.communicator)
    args.device = common.device_of(args, comm)

    train = data.load(args.dataset, args.data_dir)[0] if comm.rank == 0 else None
    if comm.rank == 0:
        train = [image for image, _ in train[: args.subset]]
        print(f"{args.dataset}: {len(train)} images", flush=True)
    train = chainermn.scatter_dataset(train, comm, shuffle=True, seed=args.seed)

    make = smorms3_dist.create_multi_node_optimizer
    trainer = fit(args, comm, train, make, args.out, args.checkpoint)
    if comm.rank == 0 and common.can_draw():
        print(f"samples: {args.out}/samples_{trainer.updater.epoch:03}.png", flush=True)
    if args.compare:
        common.compare(args, comm, trainer, functools.partial(fit, args, comm, train))


def fit(
    args: argparse.Namespace,
    comm: Any,
    train: Any,
    create_multi_node_optimizer: common.CreateOptimizer,
    out: str,
    checkpoint: Path | None = None,
) -> training.Trainer:
    """Trains two fresh models, which are the same for the same seed, and returns the trainer."""
    np.random.seed(args.seed + comm.rank)
    models = {
        "generator": Generator(args.noise, args.channels),
        "discriminator": Discriminator(args.channels),
    }
    optimizers = {}
    for name, model in models.items():
        model.to_device(args.device)
        # The line that is not ChainerMN's: there, it is chainermn.create_multi_node_optimizer.
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.Adam(alpha=args.alpha, beta1=0.5), comm
        )
        optimizer.setup(model)
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.0001))
        optimizers[name] = optimizer

    train_iter = chainer.iterators.SerialIterator(train, args.batchsize)
    updater = DCGANUpdater(train_iter, optimizers, device=args.device)
    trainer = training.Trainer(updater, (args.epoch, "epoch"), out=out)

    losses = ["generator/loss", "discriminator/loss"]
    common.report(trainer, comm, losses, {"loss.png": losses})
    if comm.rank == 0 and common.can_draw():
        trainer.extend(draw_samples, trigger=(1, "epoch"))
    common.keep_checkpoints(trainer, checkpoint)

    trainer.run()
    return trainer


def draw_samples(trainer: training.Trainer) -> None:
    """Draws what the generator makes of the same noise each time, six rows of ten."""
    import matplotlib.image

    generator = trainer.updater.get_optimizer("generator").target
    noise = generator.noise(60, np.random.RandomState(0))
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        images = chainer.backends.cuda.to_cpu(generator(noise).array)
    grid = images.reshape(6, 10, 28, 28).transpose(0, 2, 1, 3).reshape(6 * 28, 10 * 28)
    path = os.path.join(trainer.out, f"samples_{trainer.updater.epoch:03}.png")
    matplotlib.image.imsave(path, grid, cmap="gray", vmin=0, vmax=1)


def parse_args() -> argparse.Namespace:
    parser = common.parser("Train a DCGAN with sharded Adams.", batchsize=50, epoch=25)
    parser.add_argument("--channels", type=int, default=64, help="of the smallest pictures")
    parser.add_argument("--noise", type=int, default=50, help="numbers that a picture is drawn of")
    parser.add_argument("--alpha", type=float, default=0.0002, help="Adam's learning rate")
    parser.add_argument("--dataset", choices=["mnist", "fashion-mnist"], default="mnist")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help=f"with Fashion-MNIST's files; if not given, {data.DEBIAN_FASHION_MNIST} if it is "
        "there, or else a download by Chainer",
    )
    parser.add_argument("--subset", type=int, help="train on so many images only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
