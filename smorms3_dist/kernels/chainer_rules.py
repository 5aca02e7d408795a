"""Chainer's update rules as formulas: what one step does to one element.

The arithmetic of a formula is a function of the mean gradient ``d``, the parameter ``p``, the
states of the element, and the constants of the step. It gives the new parameter and the new states.
Beside each stands what computes its constants from an update rule, as Chainer does: in Python, once
a step.

The operations stand in the order of Chainer's ``update_core_cpu``, since any other order rounds in
another way. Numbers come as constants, even 0 and 1: one that is written out would widen float32
to float64 where the arithmetic is compiled. Nothing but arithmetic, square roots and the functions
here that choose between two numbers may occur in it: `smorms3_dist.kernels.cuda_rules` makes C++ of
the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from chainer.optimizers.ada_delta import AdaDeltaRule
from chainer.optimizers.ada_grad import AdaGradRule
from chainer.optimizers.adam import AdamRule
from chainer.optimizers.corrected_momentum_sgd import CorrectedMomentumSGDRule
from chainer.optimizers.momentum_sgd import MomentumSGDRule
from chainer.optimizers.msvag import MSVAGRule
from chainer.optimizers.nesterov_ag import NesterovAGRule
from chainer.optimizers.rmsprop import RMSpropRule
from chainer.optimizers.rmsprop_graves import RMSpropGravesRule
from chainer.optimizers.sgd import SGDRule
from chainer.optimizers.smorms3 import SMORMS3Rule


class Formula(NamedTuple):
    """The arithmetic of a rule, or of one of its variants.

    Attributes:
        states: Names of the states, in the order in which the arithmetic takes and gives them.
        arithmetic: Takes ``d``, ``p``, the states and the constants of an element; gives the new
            parameter and, behind it, the new states.
    """

    states: tuple[str, ...]
    arithmetic: Callable[..., Any]

    @property
    def name(self) -> str:
        """The name of the arithmetic, such as ``MomentumSgd``."""
        return self.arithmetic.__name__.title().replace("_", "")

    @property
    def constant_count(self) -> int:
        """How many constants the arithmetic takes."""
        return self.arithmetic.__code__.co_argcount - 2 - len(self.states)


Constants = tuple[float, ...]
Application = tuple[Formula, Constants]
"""A formula with the constants of one step."""


def application_of(kind: type, rule: Any, dtype: np.dtype) -> Application | None:
    """What a rule does in the step that its ``t`` counts.

    Args:
        kind: The class of Chainer's whose arithmetic the rule has: a key of `CHAINER_RULES`.
        rule: The rule.
        dtype: The dtype of the update.

    Returns:
        The formula and its constants; or ``None`` if that is best left to the rule's own code,
        which fails: its ``eps`` is nothing in this dtype.
    """
    eps = getattr(rule.hyperparam, "eps", 0) if kind in _CHECKING_EPS else 0
    if eps != 0 and dtype.type(eps) == 0:
        return None
    formula, constants = CHAINER_RULES[kind]
    return formula(rule.hyperparam), constants(rule, rule.hyperparam)


def count_on(rule: Any, times: int) -> None:
    """Changes in a rule what its own code changes in each update besides states: a power."""
    if isinstance(rule, MSVAGRule):
        for _ in range(times):
            rule.beta_power *= rule.hyperparam.beta


def smaller(one: Any, other: Any) -> Any:
    """The smaller number, or nan if there is one, as ``numpy.minimum`` does."""
    return one if one < other or one != one else other


def larger(one: Any, other: Any) -> Any:
    """The larger number, or nan if there is one, as ``numpy.maximum`` does."""
    return one if one > other or one != one else other


def unless_nan(one: Any, other: Any) -> Any:
    """A number, or another one if it is nan."""
    return one if one == one else other


# SMORMS3


def _smorms3(d, p, mem, g, g2, one, lr, eps):  # type: ignore[no-untyped-def]
    r = one / (mem + one)
    keep = one - r
    step = r * d
    g = keep * g + step
    g2 = keep * g2 + step * d
    x = g * g / (g2 + eps)
    return p - d * smaller(x, lr) / (math.sqrt(g2) + eps), one + mem * (one - x), g, g2


SMORMS3 = Formula(("mem", "g", "g2"), _smorms3)


def _of_smorms3(rule: Any, hp: Any) -> Constants:
    return 1, hp.lr, hp.eps


# SGD, and with momentum


def _sgd(d, p, lr):  # type: ignore[no-untyped-def]
    return p - lr * d


SGD = Formula((), _sgd)


def _of_sgd(rule: Any, hp: Any) -> Constants:
    return (hp.lr,)


def _momentum_sgd(d, p, v, lr, momentum):  # type: ignore[no-untyped-def]
    v = momentum * v - lr * d
    return p + v, v


MOMENTUM_SGD = Formula(("v",), _momentum_sgd)


def _of_momentum_sgd(rule: Any, hp: Any) -> Constants:
    return hp.lr, hp.momentum


def _corrected_momentum_sgd(d, p, v, lr, momentum):  # type: ignore[no-untyped-def]
    v = momentum * v - d
    return p + lr * v, v


CORRECTED_MOMENTUM_SGD = Formula(("v",), _corrected_momentum_sgd)


def _nesterov_ag(d, p, v, lr, momentum, momentum_squared, lookahead):  # type: ignore[no-untyped-def]
    v = momentum * v - lr * d
    return p + momentum_squared * v - lookahead * d, v


NESTEROV_AG = Formula(("v",), _nesterov_ag)


def _of_nesterov_ag(rule: Any, hp: Any) -> Constants:
    lr, momentum = hp.lr, hp.momentum
    return lr, momentum, momentum * momentum, (1 + momentum) * lr


# Adam and its variants. ``keep`` is what decoupled weight decay leaves of a parameter.


def _adam(d, p, m, v, alpha, rate1, rate2, eps, keep, eta):  # type: ignore[no-untyped-def]
    m = m + rate1 * (d - m)
    v = v + rate2 * (d * d - v)
    step = alpha / (math.sqrt(v) + eps)
    return keep * p + eta * (step * m), m, v


def _amsgrad(d, p, m, v, vhat, alpha, rate1, rate2, eps, keep, eta):  # type: ignore[no-untyped-def]
    m = m + rate1 * (d - m)
    v = v + rate2 * (d * d - v)
    vhat = larger(vhat, v)
    step = alpha / (math.sqrt(vhat) + eps)
    return keep * p + eta * (step * m), m, v, vhat


def _adabound(  # type: ignore[no-untyped-def]
    d, p, m, v, alpha, rate1, rate2, eps, keep, eta, lower, upper
):
    m = m + rate1 * (d - m)
    v = v + rate2 * (d * d - v)
    step = alpha / (math.sqrt(v) + eps)
    step = smaller(larger(step, lower), upper)
    return keep * p + eta * (step * m), m, v


def _amsbound(  # type: ignore[no-untyped-def]
    d, p, m, v, vhat, alpha, rate1, rate2, eps, keep, eta, lower, upper
):
    m = m + rate1 * (d - m)
    v = v + rate2 * (d * d - v)
    vhat = larger(vhat, v)
    step = alpha / (math.sqrt(vhat) + eps)
    step = smaller(larger(step, lower), upper)
    return keep * p + eta * (step * m), m, v, vhat


ADAM = Formula(("m", "v"), _adam)
AMSGRAD = Formula(("m", "v", "vhat"), _amsgrad)
ADABOUND = Formula(("m", "v"), _adabound)
AMSBOUND = Formula(("m", "v", "vhat"), _amsbound)


def _adam_of(hp: Any) -> Formula:
    if hp.adabound:
        return AMSBOUND if hp.amsgrad else ADABOUND
    return AMSGRAD if hp.amsgrad else ADAM


def _of_adam(rule: Any, hp: Any) -> Constants:
    constants = (
        rule.alpha_t,
        1.0 - hp.beta1,
        1.0 - hp.beta2,
        hp.eps,
        1.0 - hp.eta * hp.weight_decay_rate,
        -hp.eta,
    )
    return constants + rule.bounds if hp.adabound else constants


# M-SVAG


def _msvag(  # type: ignore[no-untyped-def]
    d, p, m, v, zero, one, lr, rate, eta, decay, rho, one_minus_rho, one_minus_power
):
    m = m + rate * (d - m)
    v = v + rate * (d * d - v)
    mt = m / one_minus_power
    vt = v / one_minus_power
    mt2 = mt * mt
    s = (vt - mt2) / one_minus_rho
    factor = smaller(larger(mt2 / (mt2 + rho * s), zero), one)
    factor = unless_nan(factor, zero)
    return p - eta * (lr * mt * factor + decay * p), m, v


MSVAG = Formula(("m", "v"), _msvag)


def _of_msvag(rule: Any, hp: Any) -> Constants:
    beta, power = hp.beta, rule.beta_power
    rho = (1.0 - beta) ** 2 * (1.0 - power**2) / ((1.0 - power) ** 2 * (1.0 - beta**2))
    rho = min(rho, 0.9999)
    return 0, 1, hp.lr, 1 - beta, hp.eta, hp.weight_decay_rate, rho, 1 - rho, 1 - power


# AdaGrad and AdaDelta


def _ada_grad(d, p, h, lr, eps):  # type: ignore[no-untyped-def]
    h = h + d * d
    return p - lr * d / (math.sqrt(h) + eps), h


ADA_GRAD = Formula(("h",), _ada_grad)


def _of_ada_grad(rule: Any, hp: Any) -> Constants:
    return hp.lr, hp.eps


def _ada_delta(d, p, msg, msdx, rho, one_minus_rho, eps):  # type: ignore[no-untyped-def]
    msg = rho * msg + one_minus_rho * d * d
    dx = math.sqrt((msdx + eps) / (msg + eps)) * d
    msdx = rho * msdx + one_minus_rho * dx * dx
    return p - dx, msg, msdx


ADA_DELTA = Formula(("msg", "msdx"), _ada_delta)


def _of_ada_delta(rule: Any, hp: Any) -> Constants:
    return hp.rho, 1 - hp.rho, hp.eps


# RMSprop


def _rmsprop(d, p, ms, lr, alpha, one_minus_alpha, eps):  # type: ignore[no-untyped-def]
    ms = alpha * ms + one_minus_alpha * d * d
    return p - lr * d / (math.sqrt(ms) + eps), ms


def _rmsprop_eps_inside_sqrt(  # type: ignore[no-untyped-def]
    d, p, ms, lr, alpha, one_minus_alpha, eps
):
    ms = alpha * ms + one_minus_alpha * d * d
    return p - lr * d / math.sqrt(ms + eps), ms


RMSPROP = Formula(("ms",), _rmsprop)
RMSPROP_EPS_INSIDE_SQRT = Formula(("ms",), _rmsprop_eps_inside_sqrt)


def _rmsprop_of(hp: Any) -> Formula:
    return RMSPROP_EPS_INSIDE_SQRT if hp.eps_inside_sqrt else RMSPROP


def _of_rmsprop(rule: Any, hp: Any) -> Constants:
    return hp.lr, hp.alpha, 1 - hp.alpha, hp.eps


def _rmsprop_graves(  # type: ignore[no-untyped-def]
    d, p, n, g, delta, lr, alpha, one_minus_alpha, momentum, eps
):
    n = alpha * n + one_minus_alpha * d * d
    g = alpha * g + one_minus_alpha * d
    delta = momentum * delta - lr * d / math.sqrt(n - g * g + eps)
    return p + delta, n, g, delta


RMSPROP_GRAVES = Formula(("n", "g", "delta"), _rmsprop_graves)


def _of_rmsprop_graves(rule: Any, hp: Any) -> Constants:
    return hp.lr, hp.alpha, 1 - hp.alpha, hp.momentum, hp.eps


def _always(formula: Formula) -> Callable[[Any], Formula]:
    return lambda hp: formula


CHAINER_RULES: dict[type, tuple[Callable[[Any], Formula], Callable[[Any, Any], Constants]]] = {
    SMORMS3Rule: (_always(SMORMS3), _of_smorms3),
    SGDRule: (_always(SGD), _of_sgd),
    MomentumSGDRule: (_always(MOMENTUM_SGD), _of_momentum_sgd),
    CorrectedMomentumSGDRule: (_always(CORRECTED_MOMENTUM_SGD), _of_momentum_sgd),
    NesterovAGRule: (_always(NESTEROV_AG), _of_nesterov_ag),
    AdamRule: (_adam_of, _of_adam),
    MSVAGRule: (_always(MSVAG), _of_msvag),
    AdaGradRule: (_always(ADA_GRAD), _of_ada_grad),
    AdaDeltaRule: (_always(ADA_DELTA), _of_ada_delta),
    RMSpropRule: (_rmsprop_of, _of_rmsprop),
    RMSpropGravesRule: (_always(RMSPROP_GRAVES), _of_rmsprop_graves),
}
"""By Chainer's class, what gives the formula of a rule, by its hyperparameters, and the constants
of a step, by the rule and its hyperparameters."""

FORMULAS = (
    *(SMORMS3, SGD, MOMENTUM_SGD, CORRECTED_MOMENTUM_SGD, NESTEROV_AG),
    *(ADAM, AMSGRAD, ADABOUND, AMSBOUND, MSVAG),
    *(ADA_GRAD, ADA_DELTA, RMSPROP, RMSPROP_EPS_INSIDE_SQRT, RMSPROP_GRAVES),
)
"""All formulas."""

_CHECKING_EPS = (AdamRule, RMSpropRule)
