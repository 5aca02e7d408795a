"""Every rule of Chainer's in each of its variants, with hyperparameters of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import chainer
from chainer import optimizers

VARIANTS: dict[str, Callable[[], chainer.GradientMethod]] = {
    "SMORMS3": functools.partial(optimizers.SMORMS3, lr=0.01),
    "SGD": functools.partial(optimizers.SGD, lr=0.3),
    "MomentumSGD": functools.partial(optimizers.MomentumSGD, lr=0.3, momentum=0.7),
    "CorrectedMomentumSGD": functools.partial(
        optimizers.CorrectedMomentumSGD, lr=0.3, momentum=0.7
    ),
    "NesterovAG": functools.partial(optimizers.NesterovAG, lr=0.3, momentum=0.7),
    "Adam": functools.partial(optimizers.Adam, alpha=0.02, eta=0.7),
    "AdamW": functools.partial(optimizers.AdamW, eta=0.7, weight_decay_rate=0.03),
    "AMSGrad": functools.partial(optimizers.AMSGrad, alpha=0.02, beta2=0.6),
    # Bounds that some elements reach, and others do not.
    "AdaBound": functools.partial(optimizers.AdaBound, final_lr=0.3, gamma=0.2),
    "AMSBound": functools.partial(optimizers.AMSBound, beta2=0.6, final_lr=0.3, gamma=0.2),
    "MSVAG": functools.partial(optimizers.MSVAG, beta=0.8, eta=0.7, weight_decay_rate=0.03),
    "AdaGrad": functools.partial(optimizers.AdaGrad, lr=0.3),
    "AdaDelta": functools.partial(optimizers.AdaDelta, rho=0.7),
    "RMSprop": functools.partial(optimizers.RMSprop, lr=0.3, alpha=0.7),
    "RMSprop, eps inside": functools.partial(
        optimizers.RMSprop, lr=0.3, alpha=0.7, eps=1e-3, eps_inside_sqrt=True
    ),
    "RMSpropGraves": functools.partial(optimizers.RMSpropGraves, lr=0.3, alpha=0.7),
}
