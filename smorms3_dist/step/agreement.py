"""What each rank knows about the coming step, and what all of them make of it.

Ranks that take different ways through a step would wait for each other for ever. So before each
step they exchange one word: flags, of which one rank's is enough for all, and a digest of the hooks
that run on shards and of whatever else has to be the same.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Protocol

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.hooks import running as hooks
from smorms3_dist.sharding.model import ModelView
from smorms3_dist.sharding.rules import Kind

import chainer

LAY_OUT = 1
"""The model, or how it is updated, has changed since the last step, or there was none."""

BROADCAST = 2
"""Parameters have to be broadcast."""

STEP = 4
"""A step is made after a broadcast, too."""

WHOLE_GRADIENTS = 8
"""Somebody needs whole gradients."""

BUSY = 16
"""Something in the background has not come to its end."""

FAILED = 32
"""Something in the background has failed."""

IN_STEP = 64
"""This rank makes a step."""

BETWEEN_STEPS = 128
"""This rank saves or loads, together with all others."""

ASKED_TO_END = 1 << 56
"""This rank is asked to save a checkpoint and to end."""

REMEDY = (
    "To save whole states, use smorms3_dist.extensions.snapshot, or call optimizer.consolidate() on"
    " all ranks before one of them saves; smorms3_dist.ShardedCheckpoint saves shards and loads "
    "them at any world size"
)
"""What to do about states of one shard where whole ones are needed."""

_FLAGS = 0xFF | ASKED_TO_END
_DIGEST = (1 << 24) - 1


@dataclasses.dataclass
class StepPlan:
    """What one rank knows about the coming step.

    Attributes:
        flags: The flags above that this rank raises.
        program: Everything that makes ranks communicate in the middle of a step, or that acts on
            shards, in order and in words.
        tied: The parameters that several paths lead to, in words.
        reason: Why whole gradients are needed, or ``None``.
        fused: The hooks, if the fused update can do what they do, else ``None``.
        snapshots: What has been saved and loaded since the last step, in words.
    """

    flags: int
    program: tuple[str, ...]
    tied: tuple[str, ...]
    reason: str | None
    fused: hooks.FusedHooks | None
    snapshots: tuple[str, ...] = ()

    @classmethod
    def of(cls, optimizer: chainer.GradientMethod, model: ModelView, flags: int) -> StepPlan:
        """Looks through the hooks of an optimizer and of the update rules of its model."""
        program: list[str] = ["dynamic loss scaling"] if optimizer._loss_scaling_is_dynamic else []
        reasons: list[str] = []

        def look_at(hookable: object, owner: str, of_rule: bool) -> None:
            for timing in ("pre", "post"):
                for name, hook in hooks.of(hookable, timing):
                    if hooks.runs_on_shards(hook, of_rule):
                        program.append(f"{timing} hook {name!r} ({type(hook).__name__}){owner}")
                    else:
                        reasons.append(
                            f"the hook {name!r}{owner} needs them (it is not known to treat each "
                            "element of each parameter by itself: call_for_each_param and "
                            "is_elementwise)"
                        )

        hooked = []
        look_at(optimizer._hookable, "", of_rule=False)
        for path, param in model.initialized.items():
            if model.plans[path].kind in (Kind.FUSED, Kind.ELEMENTWISE):
                rule = param.update_rule
                if not hooks.any_of(rule._hookable):
                    continue
                owner = f" of the {'' if rule.enabled else 'disabled '}update rule of {path}"
                look_at(rule._hookable, owner, of_rule=True)
                hooked.append(rule._hookable)
        tied = tuple(f"{n} paths to {name}" for name, n in model.paths.items() if n > 1)
        fused = hooks.fused(optimizer._hookable, hooked)
        everywhere = {plan.kind for plan in model.plans.values()} <= {Kind.FUSED, Kind.NONE}
        if program and (tied or not everywhere):
            fused = None
        return cls(flags, tuple(program), tied, reasons[0] if reasons else None, fused)


class Background(Protocol):
    """What goes on beside the training, and communicates only between steps."""

    def flags(self) -> int:
        """`BUSY` or `FAILED` as it stands on this rank, or 0."""

    def proceed(self, flags: int) -> None:
        """Goes on. Collective.

        Args:
            flags: What all ranks have raised for the coming step.
        """


def agree(plan: StepPlan, collectives: Collectives) -> int:
    """Exchanges what the ranks know. Collective.

    Args:
        plan: What this rank knows.
        collectives: The ranks.

    Returns:
        The flags that any rank has raised.

    Raises:
        RuntimeError: If ranks would take different ways through the step, saying how they differ.
    """
    program = plan.program + plan.tied + plan.snapshots
    digest = zlib.crc32(repr(program).encode()) & _DIGEST if program else 0
    # Two ranks have different digests exactly if some bit is set here and its complement there.
    word = plan.flags | IN_STEP | digest << 8 | (digest ^ _DIGEST) << 32
    word = collectives.all_reduce_or(word)
    _check_occasion(word)
    if word >> 8 & word >> 32 & _DIGEST:
        _compare_snapshots(collectives.all_gather_object(plan.snapshots))
        programs = collectives.all_gather_object(program)
        rank = next(r for r, other in enumerate(programs) if other != programs[0])
        raise RuntimeError(
            f"the ranks would take different ways through this step: rank 0 has "
            f"{_words(programs[0], programs[rank])}, which rank {rank} has not, and rank {rank} has"
            f" {_words(programs[rank], programs[0])}. Configure hooks, loss scaling and model alike"
            " on every rank"
        )
    return word & _FLAGS


def meet(collectives: Collectives, flags: int = 0) -> int:
    """Lets all ranks come together to save or to load. Collective.

    Args:
        collectives: The ranks.
        flags: Flags of this rank.

    Returns:
        The flags that any rank has raised.

    Raises:
        RuntimeError: If other ranks make a step instead.
    """
    word = collectives.all_reduce_or(flags | BETWEEN_STEPS)
    _check_occasion(word)
    return word & _FLAGS


def _check_occasion(word: int) -> None:
    if word & IN_STEP and word & BETWEEN_STEPS:
        raise RuntimeError(
            "some ranks save or load a checkpoint or a snapshot, while others make a step: all "
            "ranks have to do it together. Extend the trainer with it on all ranks, with the same "
            "trigger"
        )


def _compare_snapshots(snapshots: list[tuple[str, ...]]) -> None:
    for rank, other in enumerate(snapshots):
        if other != snapshots[0]:
            here, there = (", and ".join(s) or "has done nothing" for s in (snapshots[0], other))
            raise RuntimeError(
                f"since the last step rank 0 {here}, but rank {rank} {there}. Do the same on all "
                f"ranks; a shard that not all ranks save is of no use. {REMEDY}"
            )


def _words(program: tuple[str, ...], other: tuple[str, ...]) -> str:
    return ", ".join(entry for entry in program if entry not in other) or "nothing more"
