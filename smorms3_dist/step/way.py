"""The way that a step takes: who sees the mean gradients, and where they are until then.

What happens in a step, and when, is Chainer's whichever way it takes. Parameters come out the same.
"""

from __future__ import annotations

import dataclasses
import enum

from smorms3_dist.chainer_internals import has_hooks, hooks_of, is_loss_scale_dynamic
from smorms3_dist.device.memory import Memory
from smorms3_dist.hooks.recognition import FusedHooks, fused_hooks, runs_on_shards
from smorms3_dist.sharding.model import ModelView
from smorms3_dist.sharding.rules import Kind

import chainer


class Way(enum.Enum):
    """One of the four ways through a step."""

    STREAMED = "streamed"
    """Nothing wants to see gradients but weight decay, which the update carries out itself: each
    piece of the mean is used for the update as soon as it is there."""

    CHECKED = "checked"
    """On GPUs: the mean gradient of the shard is kept until its norm is known and whether it is
    finite. The update does the rest, and the host waits for nothing on the way."""

    STAGED = "staged"
    """Hooks, dynamic loss scaling or the user see the mean gradient of the shard."""

    REPLICATED = "replicated"
    """Hooks see the whole mean gradients."""


@dataclasses.dataclass
class StepPlan:
    """What one rank knows about the coming step, as far as its hooks and its model say.

    Attributes:
        program: Everything that makes ranks communicate in the middle of a step, or that acts on
            shards, in order and in words.
        tied: The parameters that several paths lead to, in words.
        needs_whole: Why whole gradients are needed, or ``None``.
        fused: The hooks, if the fused update can do what they do, else ``None``.
        dynamic: Whether the loss scale is dynamic.
    """

    program: tuple[str, ...]
    tied: tuple[str, ...]
    needs_whole: str | None
    fused: FusedHooks | None
    dynamic: bool

    @classmethod
    def of(cls, optimizer: chainer.GradientMethod, model: ModelView) -> StepPlan:
        """Looks through the hooks of an optimizer and of the update rules of its model."""
        dynamic = is_loss_scale_dynamic(optimizer)
        program: list[str] = ["dynamic loss scaling"] if dynamic else []
        reasons: list[str] = []

        def look_at(owner: object, whose: str, of_rule: bool) -> None:
            for timing in ("pre", "post"):
                for name, hook in hooks_of(owner, timing):
                    if runs_on_shards(hook, of_rule):
                        program.append(f"{timing} hook {name!r} ({type(hook).__name__}){whose}")
                    else:
                        reasons.append(
                            f"the hook {name!r}{whose} needs them (it is not known to treat each "
                            "element of each parameter by itself: call_for_each_param and "
                            "is_elementwise)"
                        )

        hooked = []
        look_at(optimizer, "", of_rule=False)
        for path, param in model.initialized.items():
            if model.plans[path].kind in (Kind.FUSED, Kind.ELEMENTWISE):
                rule = param.update_rule
                if not has_hooks(rule):
                    continue
                whose = f" of the {'' if rule.enabled else 'disabled '}update rule of {path}"
                look_at(rule, whose, of_rule=True)
                hooked.append(rule)
        tied = tuple(f"{n} paths to {name}" for name, n in model.paths.items() if n > 1)
        fused = fused_hooks(optimizer, hooked)
        everywhere = {plan.kind for plan in model.plans.values()} <= {Kind.FUSED, Kind.NONE}
        if program and (tied or not everywhere):
            fused = None
        return cls(tuple(program), tied, reasons[0] if reasons else None, fused, dynamic)


def choose_way(
    plan: StepPlan, whole_gradients: bool, keep_gradients: bool, memory: Memory
) -> tuple[Way, FusedHooks]:
    """Chooses the way of a step; the same on all ranks, since they have compared their plans.

    Args:
        plan: What this rank knows.
        whole_gradients: Whether any rank needs whole gradients.
        keep_gradients: Whether the gradients of the shards are wanted after the step.
        memory: Where the model is.

    Returns:
        The way, and the hooks that the fused update carries out on it.
    """
    if whole_gradients:
        return Way.REPLICATED, FusedHooks()
    fused = plan.fused
    if fused is None or keep_gradients:
        return Way.STAGED, FusedHooks()
    if fused.clipping is None and not plan.dynamic:
        return Way.STREAMED, fused
    if memory.launcher is None or (fused.clipping is not None and memory.exact):
        # Chainer's norms to the last bit are those of its own arithmetic.
        return Way.STAGED, FusedHooks()
    return Way.CHECKED, fused
