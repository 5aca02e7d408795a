"""How an update rule is run on a shard: fused, by its own code on segments, or whole.

Chainer's SMORMS3 has a kernel. A rule of Chainer's or the user's that says ``is_elementwise`` and
whose states are arrays like its parameter runs its own ``update_core`` on segments. Anything else
is left to itself: whole gradients, whole states, on every rank.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals import hooks_of, stand_in, uses_fp32_update
from smorms3_dist.hooks.recognition import runs_on_shards

import chainer
import numpy as np
from chainer.optimizers.ada_delta import AdaDeltaRule
from chainer.optimizers.ada_grad import AdaGradRule
from chainer.optimizers.adam import AdamRule
from chainer.optimizers.corrected_momentum_sgd import CorrectedMomentumSGDRule
from chainer.optimizers.momentum_sgd import MomentumSGDRule
from chainer.optimizers.nesterov_ag import NesterovAGRule
from chainer.optimizers.rmsprop import RMSpropRule
from chainer.optimizers.rmsprop_graves import RMSpropGravesRule
from chainer.optimizers.sgd import SGDRule
from chainer.optimizers.smorms3 import SMORMS3Rule

_WITHOUT_PROGRESS = (
    AdaDeltaRule,
    AdaGradRule,
    AdamRule,
    CorrectedMomentumSGDRule,
    MomentumSGDRule,
    NesterovAGRule,
    RMSpropGravesRule,
    RMSpropRule,
    SGDRule,
    SMORMS3Rule,
)


class Kind(enum.Enum):
    """Who updates a parameter, and on what."""

    NONE = "not updated"
    FUSED = "the SMORMS3 kernel on shards"
    ELEMENTWISE = "the rule's own code on segments"
    WHOLE = "the rule's own code on whole arrays"


class Plan(NamedTuple):
    """How one parameter is updated; parameters of a group have equal plans.

    Attributes:
        kind: Who updates it.
        rule: Name of the rule's class.
        dtype: The dtype of states, and of masters if the parameter has another one.
        states: Names and dtypes of the states that are sharded.
        reason: Why the rule is run whole; empty otherwise.
    """

    kind: Kind
    rule: str = ""
    dtype: np.dtype = np.dtype(np.float32)
    states: tuple[tuple[str, np.dtype], ...] = ()
    reason: str = ""

    @property
    def label(self) -> str:
        """The plan in words, equal exactly if plans are."""
        if self.kind is Kind.NONE:
            return "no update rule"
        if self.kind is Kind.WHOLE:
            return f"{self.rule}, whole"
        states = ", ".join(f"{name} {dtype}" for name, dtype in self.states)
        return (
            f"{self.rule} in {self.dtype} ({states})" if states else f"{self.rule} in {self.dtype}"
        )


def plan(param: chainer.Parameter) -> Plan:
    """Decides how an initialized parameter is updated."""
    rule = param.update_rule
    if rule is None:
        return Plan(Kind.NONE, dtype=param.dtype)
    name = type(rule).__name__
    if not isinstance(rule, chainer.UpdateRule) or rule.is_elementwise is not True:
        return Plan(Kind.WHOLE, name, reason="it is not elementwise")
    if type(rule).update is not chainer.UpdateRule.update:
        return Plan(Kind.WHOLE, name, reason="it has an update() of its own")
    dtype = update_dtype(rule, param.dtype)
    hook = whole_hook(rule) if dtype != param.dtype else None
    if hook is not None:
        return Plan(Kind.WHOLE, name, reason=f"its hook {hook!r} wants the whole fp32 parameter")
    if is_smorms3(rule):
        return Plan(Kind.FUSED, name, dtype, tuple((state, dtype) for state in ("mem", "g", "g2")))
    states = _states(rule, dtype)
    if states is None:
        return Plan(Kind.WHOLE, name, reason="its states are not arrays like the parameter")
    return Plan(Kind.ELEMENTWISE, name, dtype, states)


def update_dtype(rule: chainer.UpdateRule, dtype: np.dtype) -> np.dtype:
    """The dtype in which a rule updates a parameter of a dtype."""
    return np.dtype(np.float32) if uses_fp32_update(rule) and dtype == np.float16 else dtype


def whole_hook(rule: chainer.UpdateRule) -> str | None:
    """The name of the first hook of a rule that cannot run on shards, or ``None``."""
    for name, hook in hooks_of(rule):
        if not runs_on_shards(hook, of_rule=True):
            return name
    return None


def is_smorms3(rule: Any) -> bool:
    """Whether a rule is Chainer's SMORMS3 and nothing else.

    A subclass with an update of its own is not: the kernels would pass over what it does.
    """
    return isinstance(rule, SMORMS3Rule) and all(
        getattr(type(rule), name) is getattr(SMORMS3Rule, name)
        for name in ("update", "update_core", "update_core_cpu", "init_state")
    )


def has_progress(rule: chainer.UpdateRule) -> bool:
    """Whether an update may change attributes of the rule besides its states and its ``t``.

    MSVAG's rule does (a power of its decay rate), and a user's may.
    """
    return type(rule) not in _WITHOUT_PROGRESS


def progress_of(rule: chainer.UpdateRule) -> dict[str, int | float]:
    """The numbers that an update changes besides ``t``, by attribute."""
    if not has_progress(rule):
        return {}
    return {
        name: value
        for name, value in vars(rule).items()
        if type(value) in (int, float) and name != "t" and not name.startswith("_")
    }


def _states(rule: chainer.UpdateRule, dtype: np.dtype) -> tuple[tuple[str, np.dtype], ...] | None:
    """Names and dtypes of the states, or ``None`` if they are not arrays like the parameter."""
    sample = chainer.Parameter(np.ones(2, dtype))
    sample.grad = np.zeros(2, dtype)
    state: dict[str, Any] = {}
    stand_in(rule, state).init_state(sample)
    if any(not isinstance(v, np.ndarray) or v.shape != (2,) for v in state.values()):
        return None
    return tuple((name, value.dtype) for name, value in state.items())
