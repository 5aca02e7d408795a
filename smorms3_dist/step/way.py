"""The way that a step takes: who sees the mean gradients, and where they are until then.

What happens in a step, and when, is Chainer's whichever way it takes. Parameters come out the same.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from smorms3_dist.chainer_internals.loss_scale import is_loss_scale_dynamic
from smorms3_dist.chainer_internals.optimizers import (
    has_hooks,
    has_own_hyperparameters,
    hooks_of,
    own_hyperparameters,
)
from smorms3_dist.device.memory import Memory
from smorms3_dist.hooks.recognition import (
    FusedHooks,
    describe,
    fused_hooks,
    runs_on_shards,
    takes_norm,
)
from smorms3_dist.sharding.model import ModelView
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.step.facts import value_in_words

import chainer


class Way(enum.Enum):
    """One of the four ways through a step."""

    STREAMED = "streamed"
    """Nothing wants to see gradients but hooks that treat elements by themselves, which the update
    carries out itself: each piece of the mean is used for the update as soon as it is there."""

    CHECKED = "checked"
    """The mean gradient of the shard is kept until its norm is known and whether it is finite. The
    update does the rest; of a GPU the host waits for nothing on the way."""

    STAGED = "staged"
    """Hooks, dynamic loss scaling or the user see the mean gradient of the shard."""

    REPLICATED = "replicated"
    """Hooks see the whole mean gradients."""


class StepPlan(NamedTuple):
    """What the hooks and the model of one rank say about the coming step.

    Attributes:
        alike: What ranks must have alike of hooks and update rules, as facts.
        looking: Hooks that see whole gradients, as facts.
        needs_whole: Why whole gradients are needed, or ``None``.
        fused: The hooks, if the fused update can do what they do, else ``None``.
        dynamic: Whether the loss scale is dynamic.
    """

    alike: dict[str, str]
    looking: dict[str, str]
    needs_whole: str | None
    fused: FusedHooks | None
    dynamic: bool

    @classmethod
    def of(cls, optimizer: chainer.GradientMethod, model: ModelView) -> StepPlan:
        """Looks through the hooks of an optimizer and of the update rules of its model."""
        alike: dict[str, str] = {}
        looking: dict[str, str] = {}
        reasons: list[str] = []

        def look_at(owner: object, whose: str, of_rule: bool) -> None:
            for timing in ("pre", "post"):
                on_shards, whole = [], []
                for name, hook in hooks_of(owner, timing):
                    if runs_on_shards(hook, of_rule):
                        on_shards.append(describe(name, hook))
                        continue
                    whole.append(describe(name, hook))
                    of_whom = f" of {whose}" if of_rule else ""
                    reasons.append(
                        f"the hook {name!r}{of_whom} needs them (it is not known to treat each "
                        "element of each parameter by itself: call_for_each_param and "
                        "is_elementwise)"
                    )
                if on_shards:
                    alike[f"{timing} hooks of {whose}"] = ", ".join(on_shards)
                if whole:
                    looking[f"{timing} hooks of {whose}, on whole gradients"] = ", ".join(whole)

        hooked = []
        masters_by_norms = False
        look_at(optimizer, "the optimizer", of_rule=False)
        on_shards = bool(alike)
        for path, rule in model.peculiar_rules():
            if not rule.enabled:
                alike[f"update rule of {path}"] = "disabled"
            if has_own_hyperparameters(rule):
                own = own_hyperparameters(rule)
                told = ", ".join(f"{name}={value_in_words(value)}" for name, value in own.items())
                fact = f"hyperparameters of the update rule of {path}"
                alike[fact] = f"{type(rule).__name__}: {told}"
            if not has_hooks(rule):
                continue
            if model.plans[path].kind in (Kind.FUSED, Kind.ELEMENTWISE):
                look_at(rule, f"the update rule of {path}", of_rule=True)
                hooked.append(rule)
                if model.plans[path].has_masters(model.initialized[path].dtype):
                    masters_by_norms |= any(takes_norm(hook) for _, hook in hooks_of(rule))
            else:
                hooks = ", ".join(describe(name, hook) for name, hook in hooks_of(rule))
                looking[f"hooks of the update rule of {path}"] = hooks
        dynamic = is_loss_scale_dynamic(optimizer)
        if model.tied:
            alike["paths to tied parameters"] = ", ".join(
                f"{n} to {name}" for name, n in model.tied.items()
            )
        fused = fused_hooks(optimizer, hooked)
        everywhere = model.kinds <= {Kind.FUSED, Kind.NONE}
        if (on_shards or hooked or dynamic) and (model.tied or not everywhere):
            fused = None
        if masters_by_norms:
            # Norms of gradients as their rules see them, in a wider dtype than they are kept in.
            fused = None
        return cls(alike, looking, reasons[0] if reasons else None, fused, dynamic)


def choose_way(
    plan: StepPlan,
    whole_gradients: bool,
    keep_gradients: bool,
    memory: Memory,
    is_early: bool = False,
) -> tuple[Way, FusedHooks]:
    """Chooses the way of a step; the same on all ranks, since they have compared their plans.

    Args:
        plan: What this rank knows.
        whole_gradients: Whether any rank needs whole gradients.
        keep_gradients: Whether the gradients of the shards are wanted after the step.
        memory: Where the model is.
        is_early: Whether the reduction has begun with the backward pass, which stages what comes.

    Returns:
        The way, and the hooks that the fused update carries out on it.
    """
    if whole_gradients:
        return Way.REPLICATED, FusedHooks()
    fused = plan.fused
    on_gpu = memory.launcher is not None
    if fused is None or keep_gradients or (on_gpu and not fused.on_gpu):
        return Way.STAGED, FusedHooks()
    if not (fused.takes_norms or plan.dynamic):
        return Way.STREAMED, fused
    if on_gpu and fused.clipping is not None and memory.exact:
        # Chainer's norms to the last bit are those of its own arithmetic.
        return Way.STAGED, FusedHooks()
    if is_early and not on_gpu:
        # The mean cannot take the place of gradients that are still being sent.
        return Way.STAGED, FusedHooks()
    return Way.CHECKED, fused
