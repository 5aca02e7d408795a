"""How an update rule is run on a shard: fused, by its own code on segments, or whole.

Chainer's rules have formulas, which the fused update applies. Any other rule that says
``is_elementwise`` and whose states are arrays like its parameter runs its own ``update_core`` on
segments, on GPUs on runs of them. Anything else is left to itself: whole gradients, whole states,
on every rank.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.optimizers import (
    hooks_of,
    own_hyperparameters,
    stand_in,
    uses_fp32_update,
)
from smorms3_dist.hooks.recognition import runs_on_shards
from smorms3_dist.kernels.chainer_rules import CHAINER_RULES, Formula
from smorms3_dist.kernels.narrow import narrower
from smorms3_dist.kernels.segments import CudaUpdate

import chainer
import numpy as np
from chainer.optimizers.msvag import MSVAGRule

_WITHOUT_PROGRESS = CHAINER_RULES.keys() - {MSVAGRule}


class Kind(enum.Enum):
    """Who updates a parameter, and on what."""

    NONE = "not updated"
    FUSED = "the fused update on shards"
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
        seen_as: The narrow dtype, by its name in `SENT_AS`, to which parameters are rounded for all
            to see, while owners update masters; or ``None``.
    """

    kind: Kind
    rule: str = ""
    dtype: np.dtype = np.dtype(np.float32)
    states: tuple[tuple[str, np.dtype], ...] = ()
    reason: str = ""
    seen_as: str | None = None

    def has_masters(self, dtype: np.dtype) -> bool:
        """Whether a parameter of a dtype has a master, which is what its rule sees."""
        return self.dtype != dtype or self.seen_as is not None

    @property
    def label(self) -> str:
        """The plan in words, equal exactly if plans are."""
        if self.kind is Kind.NONE:
            return "no update rule"
        if self.kind is Kind.WHOLE:
            return f"{self.rule}, whole"
        states = ", ".join(f"{name} {dtype}" for name, dtype in self.states)
        seen = f", seen as {self.seen_as}" if self.seen_as else ""
        return f"{self.rule} in {self.dtype}{seen}" + (f" ({states})" if states else "")


def plan(param: chainer.Parameter, gather_dtype: str | None = None) -> Plan:
    """Decides how an initialized parameter is updated.

    Args:
        param: The parameter.
        gather_dtype: The dtype in which parameters are sent, where it is narrower than theirs.
    """
    rule = param.update_rule
    if rule is None:
        return Plan(Kind.NONE, dtype=param.dtype)
    name = type(rule).__name__
    if not isinstance(rule, chainer.UpdateRule) or rule.is_elementwise is not True:
        return Plan(Kind.WHOLE, name, reason="it is not elementwise")
    if type(rule).update is not chainer.UpdateRule.update:
        return Plan(Kind.WHOLE, name, reason="it has an update() of its own")
    dtype = update_dtype(rule, param.dtype)
    seen_as = gather_dtype if narrower(gather_dtype, param.dtype) else None
    hook = whole_hook(rule) if dtype != param.dtype or seen_as else None
    if hook is not None:
        return Plan(Kind.WHOLE, name, reason=f"its hook {hook!r} wants the whole fp32 parameter")
    states = _states(rule, dtype)
    if states is None:
        return Plan(Kind.WHOLE, name, reason="its states are not arrays like the parameter")
    formula = formula_of(rule)
    fused = formula is not None
    if formula is not None and hasattr(param.array, "get"):
        fused = CudaUpdate.applies(formula, dtype)
    return Plan(Kind.FUSED if fused else Kind.ELEMENTWISE, name, dtype, states, seen_as=seen_as)


def update_dtype(rule: chainer.UpdateRule, dtype: np.dtype) -> np.dtype:
    """The dtype in which a rule updates a parameter of a dtype."""
    return np.dtype(np.float32) if uses_fp32_update(rule) and dtype == np.float16 else dtype


def whole_hook(rule: chainer.UpdateRule) -> str | None:
    """The name of the first hook of a rule that cannot run on shards, or ``None``."""
    for name, hook in hooks_of(rule):
        if not runs_on_shards(hook, of_rule=True):
            return name
    return None


def _own(kind: type) -> dict[str, Any]:
    """The methods and properties that say what a rule of a class does, by name."""
    found = {
        name: value for each in reversed(kind.__mro__[:-1]) for name, value in vars(each).items()
    }
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, types.FunctionType | property) and not name.startswith("__")
    }


# As they are before anybody may have put something else in their place.
_METHODS = {kind: _own(kind) for kind in CHAINER_RULES}


def chainer_rule(rule: Any) -> type | None:
    """Chainer's class of a rule that does what this class does and nothing else, or ``None``.

    A subclass with a method of its own is something else, and so is a rule, or a class of
    Chainer's, in which a method has been replaced: formulas would pass over what it does.
    """
    kind = next((each for each in type(rule).__mro__ if each in _METHODS), None)
    if kind is None:
        return None
    now, methods = _own(type(rule)), _METHODS[kind]
    same = all(now[name] is method for name, method in methods.items())
    return kind if same and not vars(rule).keys() & methods.keys() else None


def formula_of(rule: Any) -> Formula | None:
    """The formula of a rule, as its hyperparameters are now, or ``None`` if it has none."""
    kind = chainer_rule(rule)
    return None if kind is None else CHAINER_RULES[kind][0](rule.hyperparam)


_PLAIN = len(vars(chainer.UpdateRule()))


def numbers_of(own: Mapping[str, Any]) -> tuple[int | float, ...]:
    """The count of a rule, how many attributes it has, and the numbers among those of its own.

    What rules of one class and one optimizer that are alike in them do in a step is the same.
    ``own`` are the attributes of the rule.
    """
    return (len(own), *(value for value in own.values() if type(value) in (int, float)))


def numbers_are_alike(owns: Sequence[Mapping[str, Any]], same_counts: bool = False) -> bool:
    """Whether rules are alike in what `numbers_of` them says.

    Args:
        owns: The attributes of each rule.
        same_counts: Whether it is known that they have the same ``t``.
    """
    if set(map(len, owns)) == {_PLAIN}:
        counts = set() if same_counts else {own.get("t") for own in owns}
        # A class may keep it elsewhere.
        return same_counts or (len(counts) == 1 and None not in counts)
    return len(set(map(numbers_of, owns))) == 1


_OF_EACH = frozenset({"hyperparam", "_state", "_fp32_param", "_hookable"})
"""What each rule has for its own parameter; states and masters are the shard's here."""

_VALUES = (int, float, bool, str, type(None))

_TELL_PARAMETERS_APART = frozenset({"name", "shape", "ndim"})


def do_the_same(one: chainer.UpdateRule, other: chainer.UpdateRule) -> bool:
    """Whether the code of two rules does the same to an element, as they are now."""
    return (
        type(one) is type(other)
        and one.hyperparam.parent is other.hyperparam.parent
        and _are_equal(own_hyperparameters(one), own_hyperparameters(other))
        and _are_equal(
            *({k: v for k, v in vars(r).items() if k not in _OF_EACH} for r in (one, other))
        )
    )


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        value is other[name]
        or (type(value) is type(other[name]) and type(value) in _VALUES and value == other[name])
        for name, value in one.items()
    )


def changed_values(before: chainer.UpdateRule, rule: chainer.UpdateRule) -> dict[str, Any] | None:
    """What an update has changed in a rule besides its states; ``None`` if not values alone."""
    was = vars(before)
    found = {
        name: value
        for name, value in vars(rule).items()
        if name not in _OF_EACH and (name not in was or value is not was[name])
    }
    return found if all(type(value) in _VALUES for value in found.values()) else None


def runs_on_several(rule: chainer.UpdateRule) -> bool:
    """Whether the code of an elementwise rule can be given several parameters as one array.

    Chainer's can. Code of a user's can unless it asks for what tells parameters apart.
    """
    if any(callable(value) for name, value in vars(rule).items() if name not in _OF_EACH):
        return False
    kind: Any = type(rule)
    return chainer_rule(rule) is not None or _treats_all_alike(kind)


@functools.cache
def _treats_all_alike(kind: type) -> bool:
    asked = {
        name
        for each in kind.__mro__[: kind.__mro__.index(chainer.UpdateRule)]
        for method in vars(each).values()
        if isinstance(method, types.FunctionType) and method.__name__.startswith("update_core")
        for name in method.__code__.co_names
    }
    return not asked & _TELL_PARAMETERS_APART


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
