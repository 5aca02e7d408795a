"""What optimizers, their hooks and their update rules keep: flags, states, masters."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import chainer


def hooks_of(owner: Any, timing: str | None = None) -> Iterator[tuple[str, Any]]:
    """The hooks of an optimizer or of an update rule by name, in the order of their calls.

    Args:
        owner: The optimizer or the rule.
        timing: ``'pre'``, ``'post'``, or ``None`` for both.
    """
    hookable = owner._hookable
    # An optimizer has none before its setup.
    if hookable is not None and timing != "post":
        yield from hookable._pre_update_hooks.items()
    if hookable is not None and timing != "pre":
        yield from hookable._post_update_hooks.items()


def has_hooks(owner: Any) -> bool:
    """Whether an optimizer after its setup, or an update rule, has any hook."""
    hookable = owner._hookable
    return bool(hookable._pre_update_hooks or hookable._post_update_hooks)


def call_hooks_of_rule(rule: chainer.UpdateRule, timing: str, param: chainer.Parameter) -> None:
    """Calls the hooks of an update rule with a parameter, as the rule itself would."""
    rule._hookable.call_hooks(timing, args=(rule, param))


def peculiar_rules(
    rules: Iterable[tuple[str, chainer.UpdateRule]],
) -> list[tuple[str, chainer.UpdateRule]]:
    """The named rules that are disabled, or have hooks or hyperparameters of their own."""
    # As `has_hooks` and `has_own_hyperparameters` say: runs over all parameters at every step.
    return [
        (name, rule)
        for name, rule in rules
        if not rule.enabled
        or (hooks := rule._hookable)._pre_update_hooks
        or hooks._post_update_hooks
        or len(vars(rule.hyperparam)) > 1
    ]


class RuleWatch:
    """Says at every step whether anything sets update rules apart.

    What the rules refer to is remembered, so that a look at thousands of them is a few comparisons
    in C; as long as a rule refers to the same, only what that contains can change.

    Attributes:
        rules: The rules.
        own: The attributes of each of them.
    """

    _look = operator.itemgetter("enabled", "_hookable", "hyperparam", "_state")
    _look_at = operator.attrgetter("enabled", "_hookable", "hyperparam", "_state")
    _count = operator.itemgetter("t")

    def __init__(self, rules: Iterable[chainer.UpdateRule] = ()) -> None:
        self.rules = list(rules)
        self.own: list[dict[str, Any]] = [rule.__dict__ for rule in self.rules]
        # What each rule refers to.
        self._seen: list[tuple[Any, ...]] = []
        self._enabled = self._stateless = self._of_one_optimizer = False
        self._hooks: list[dict[str, Any]] = []
        self._hyperparams: list[dict[str, Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of rules refer to something else.
        return RuleWatch, (self.rules,)

    def are_plain(self) -> bool:
        """Whether rules are enabled, without hooks and without hyperparameters of their own."""
        try:
            seen = list(map(RuleWatch._look, self.own))
        except KeyError:
            # A class may keep something elsewhere.
            seen = list(map(RuleWatch._look_at, self.rules))
        # States are arrays, which have no such comparison; besides them this is one of identities.
        if not self._stateless or seen != self._seen:
            self._note(seen)
        return self._enabled and not any(self._hooks) and set(map(len, self._hyperparams)) <= {1}

    def _note(self, seen: list[tuple[Any, ...]]) -> None:
        self._seen = seen
        self._enabled = all(enabled for enabled, *_ in seen)
        self._stateless = all(state is None for *_, state in seen)
        self._hooks = [
            hooks
            for _, hookable, *_ in seen
            for hooks in (hookable._pre_update_hooks, hookable._post_update_hooks)
        ]
        self._hyperparams = [vars(hyperparam) for _, _, hyperparam, _ in seen]
        self._of_one_optimizer = len({id(own["_parent"]) for own in self._hyperparams}) == 1

    def are_alike(self) -> bool:
        """Whether rules are plain, without states, and with one optimizer's settings."""
        return self.are_plain() and self._stateless and self._of_one_optimizer

    def add_to_counts(self, times: int) -> bool:
        """Adds to the ``t`` of the rules; returns whether it is the same for all of them now."""
        try:
            counts = list(map(RuleWatch._count, self.own))
        except KeyError:
            counts = []
        if not counts or counts.count(counts[0]) < len(counts):
            for rule in self.rules:
                rule.t += times
            return False
        count = counts[0] + times
        for own in self.own:
            own["t"] = count
        return True


def indices_of_rules_with_states(params: Sequence[chainer.Parameter]) -> list[int]:
    """The indices of the parameters whose rule has states, or an fp32 master."""
    return [
        index
        for index, param in enumerate(params)
        if (rule := param.update_rule) is not None
        and (rule._state is not None or rule._fp32_param is not None)
    ]


def forget_states(rules: Iterable[chainer.UpdateRule]) -> None:
    """Leaves rules without states and fp32 masters."""
    for rule in rules:
        rule._state = rule._fp32_param = None


def set_state(rule: chainer.UpdateRule, state: dict[str, Any] | None) -> None:
    """Replaces the states of a rule; ``None`` lets it begin afresh."""
    rule._state = state


def stand_in(rule: chainer.UpdateRule, state: dict[str, Any] | None) -> chainer.UpdateRule:
    """A copy of a rule, with hyperparameters shared and states of its own."""
    other = copy.copy(rule)
    other._state = state
    return other


def master_of(rule: chainer.UpdateRule) -> Any | None:
    """The array of the fp32 master that a rule keeps of its float16 parameter, if it has one."""
    master = rule._fp32_param
    return None if master is None else master.array


def set_master(rule: chainer.UpdateRule, array: Any | None, name: str | None = None) -> None:
    """Replaces the fp32 master of a rule; ``None`` for no master."""
    rule._fp32_param = None if array is None else chainer.Parameter(array, name=name)


def uses_fp32_update(owner: Any) -> bool:
    """Whether an optimizer, or an update rule, updates float16 parameters in float32."""
    return bool(owner._use_fp32_update)


def own_hyperparameters(owner: Any) -> dict[str, Any]:
    """The hyperparameters of an optimizer, or those that an update rule has of its own."""
    return {name: value for name, value in vars(owner.hyperparam).items() if name != "_parent"}


def has_own_hyperparameters(rule: chainer.UpdateRule) -> bool:
    """Whether an update rule differs from its optimizer in any hyperparameter."""
    # Besides the optimizer's, to which it refers.
    return len(vars(rule.hyperparam)) > 1


def uses_cleargrads(optimizer: chainer.GradientMethod) -> bool:
    """Whether gradients are cleared to ``None`` before the backward pass, and not to zeros."""
    return getattr(optimizer, "_use_cleargrads", True)
