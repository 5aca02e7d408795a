"""The kinds of faults, the trainings that they befall, and what has to come of each."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.optimizer.overlap_gather import OverlapGather
from smorms3_dist.sharding.gradients_in_flight import GradientsInFlight

import acts
import models
import numpy as np
from acts import INSTEAD, SAVED, Act
from chainer import optimizer_hooks, optimizers

STEPS = 6
SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (1,), "c": (7,), "e": (33, 2)}
RULES = {
    "SMORMS3": optimizers.SMORMS3,
    "SGD": optimizers.SGD,
    "MomentumSGD": optimizers.MomentumSGD,
    "Adam": optimizers.Adam,
}
HOOKS: dict[str, Callable[[], list[Any]]] = {
    "none": list,
    "decay": lambda: [optimizer_hooks.WeightDecay(0.1)],
    "two": lambda: [optimizer_hooks.WeightDecay(0.1), optimizer_hooks.Lasso(0.1)],
    "clipping": lambda: [optimizer_hooks.GradientClipping(1.0)],
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong in which training."""

    seed: int
    kind: str
    world: int
    rank: int
    step: int
    rule: str
    gradients: str
    hooks: str
    overlap: bool = False
    overlap_gather: bool = False
    left_out: int = 0
    """The step that all ranks leave out, for the right result of those faults that cost one."""

    @classmethod
    def drawn(cls, seed: int, kinds: Iterable[str]) -> Fault:
        """The fault of a seed."""
        draw = random.Random(seed)
        name = draw.choice(list(kinds))
        world = draw.randint(2, 4)
        hooks = draw.choice(KINDS[name].hooks)
        return cls(
            seed=seed,
            kind=name,
            world=world,
            rank=draw.randrange(world),
            step=draw.randint(KINDS[name].first, STEPS),
            rule=draw.choice(list(RULES)),
            gradients=draw.choice(
                ["auto", "replicated", *([] if KINDS[name].whole else ["sharded"])]
            ),
            hooks=hooks,
            overlap=draw.random() < 0.5,
            overlap_gather=draw.random() < 0.5,
        )


class Run:
    """The training of one rank, and what is done to it."""

    def __init__(self, fault: Fault, comm: Any, directory: Path) -> None:
        self.fault = fault
        self.comm = comm
        self.directory = directory
        self.draw = random.Random(fault.seed)
        self.step = 1
        self.attempt = int(os.environ.get("SMORMS3_RESTART_COUNT", "0"))
        self.started_again = False
        self.optimizer = self.make()

    def make(self) -> Any:
        """A new model with its optimizer."""
        kind = KINDS[self.fault.kind]
        made = create_multi_node_optimizer(
            RULES[self.fault.rule](),
            self.comm,
            gradients=self.fault.gradients,
            step_after_broadcast=True,
            check_finite=kind.check_finite,
            overlap=self.fault.overlap,
            overlap_gather=self.fault.overlap_gather,
        )
        made.setup(models.Model(SHAPES))
        for hook in HOOKS[self.fault.hooks]():
            made.add_hook(hook)
        return made

    @property
    def is_hit(self) -> bool:
        """Whether the fault is here and now."""
        return (self.step, self.comm.rank) == (self.fault.step, self.fault.rank)

    def update(self, wrong: float | None = None) -> None:
        """One update, with a wrong value in the gradients if one is given."""
        model = self.optimizer.target
        if self.fault.overlap and wrong is None and self.optimizer._loss_scale is None:
            self.optimizer.update(models.loss_with_gradients, model, self.comm.rank, self.step)
            return
        models.set_gradients(model, self.comm.rank, self.step)
        if wrong is not None:
            self.optimizer.target.e.grad[1, 1] = wrong
        self.optimizer.update()

    def train(self) -> str:
        """Trains; returns a digest of the parameters."""
        kind = KINDS[self.fault.kind]
        while self.step <= STEPS:
            kind.prepare(self)
            left_out = self.step == self.fault.left_out
            if not left_out and not (self.is_hit and kind.act(self) is INSTEAD):
                self.update()
            self.step += 1
        self.optimizer.check_sync()
        parameters = models.arrays(self.optimizer.target).items()
        return hashlib.sha256(b"".join(array.tobytes() for _, array in parameters)).hexdigest()


@dataclass(frozen=True)
class Kind:
    """A kind of faults, and what has to come of it.

    Attributes:
        act: Happens on the rank with the fault, before its update or in the place of it.
        says: A pattern of what is said, of which ``{rank}`` is the rank with the fault. If none,
            the result is that of the training without the fault.
        who: Who says it: ``all`` ranks, the ``others``, or the rank with the fault, ``it``, which
            ends the job.
        prepare: Happens on all ranks before each update.
        whole: Whether somebody needs whole gradients.
        hooks: Names of `HOOKS`.
        check_finite: As of the optimizer.
        left_out: Whether the right result is that of a training without that step.
        first: The first step before which it can happen.
        small_disk: Whether the directory of the training is a small disk of its own.
        attempts: How many jobs it takes. All but the last one are killed.
    """

    act: Act
    says: str | None = None
    who: str = "all"
    prepare: Act = lambda run: None
    whole: bool = False
    hooks: tuple[str, ...] = tuple(HOOKS)
    check_finite: str = "off"
    left_out: bool = False
    first: int = 1
    small_disk: bool = False
    attempts: int = 1


def nothing(run: Run) -> None:
    """Happens where all that happens does so on all ranks."""


def differs(act: Act, fact: str, value: str = r"\S+", **options: Any) -> Kind:
    """A rank is told what the others are not: the fact is named, and the rank with its value."""
    says = rf"differ in what they must share: .*{fact}: .*{value} on rank {{rank}}\b"
    return Kind(act, says, **options)


def touches(what: str, timing: str, left: str) -> Kind:
    """A hook of one rank, which sees whole gradients, writes to something."""
    says = rf"on some ranks alone: after the {timing} hooks the {left} of /e.*'own' \(Hook\)"
    act = acts.hooked(lambda param: getattr(param, what).fill(7), timing)
    return Kind(act, rf"{says}.* rank {{rank}}\b", whole=True)


def looks(timing: str) -> Kind:
    """A hook of one rank, which sees whole gradients, only looks."""
    # Clipping takes its norm in another order of sums where gradients are whole.
    act = acts.hooked(lambda param: np.sum(param.array), timing)
    return Kind(act, whole=True, hooks=("none", "decay", "two"))


def alone(act: Act, name: str, **options: Any) -> Kind:
    """A rank does by itself what is for all ranks."""
    return Kind(act, rf"different things: .*rank {{rank}} is in .*{name}", **options)


scaled = acts.on_first_step(lambda run: run.optimizer.loss_scaling())
other_update = (
    r"number of the update: .* rank {rank}\b|different things: .*rank {rank} is in .*(update|check)"
)
kill = r"(?i)\bkilled\b|signal 9"
KINDS: dict[str, Kind] = {
    "nothing": Kind(nothing),
    "raises before an update": Kind(acts.raises, "planted", "it"),
    "raises in the loss": Kind(lambda run: run.optimizer.update(acts.raises), "planted", "it"),
    "raises in a hook": Kind(nothing, "planted", "it", acts.raising_hook, whole=True),
    "leaves": Kind(acts.leaves, r"rank {rank} has ended its script after \d updates?", "others"),
    "skips an update": Kind(acts.skips, other_update),
    "repeats an update": Kind(Run.update, other_update),
    "hyperparameter": differs(acts.other_hyperparameter, r"\w+ of the optimizer"),
    "hyperparameter of a rule": differs(
        acts.other_hyperparameter_of_a_rule, "update rule of /e", r"Rule: .*=\S+"
    ),
    "enabled": differs(
        lambda run: setattr(run.optimizer.target.a.update_rule, "enabled", False),
        "update rule of /a",
        "disabled",
    ),
    "hook": differs(
        acts.other_hook(optimizer_hooks.GradientHardClipping(-1, 1)),
        "pre hooks of the optimizer",
        r"GradientHardClipping .*\)",
    ),
    "number of a hook": differs(
        acts.other_hook(optimizer_hooks.WeightDecay(0.2)),
        "pre hooks of the optimizer",
        r"rate=0.2\)",
        hooks=("decay",),
    ),
    "order of hooks": differs(
        acts.other_hook(optimizer_hooks.WeightDecay(0.1)),
        "pre hooks of the optimizer",
        r"'Lasso' \([^)]*\), 'WeightDecay' \([^)]*\)",
        hooks=("two",),
    ),
    "post hook": differs(
        lambda run: run.optimizer.add_hook(optimizer_hooks.Lasso(0.3), name="late", timing="post"),
        "post hooks of the optimizer",
        r"'late' \(Lasso with rate=0.3\)",
    ),
    "hook of a rule": differs(
        lambda run: run.optimizer.target.e.update_rule.add_hook(optimizer_hooks.WeightDecay(0.1)),
        "pre hooks of the update rule of /e",
        r"'WeightDecay' .*\)",
    ),
    "number of steps": differs(lambda run: setattr(run.optimizer, "t", 77), r"\bt", "77"),
    "static loss scale": differs(lambda run: run.optimizer.set_loss_scale(8), "loss scale", "8"),
    "dynamic loss scale": differs(
        lambda run: run.optimizer.loss_scaling(), "growth of the dynamic loss scale", r"1\.000\d+"
    ),
    "interval of the loss scale": differs(
        lambda run: run.optimizer.loss_scaling(interval=7),
        "growth of the dynamic loss scale",
        r"1\.104\d+",
        prepare=scaled,
    ),
    "kept gradients": differs(
        lambda run: setattr(run.optimizer, "keep_gradients", True), "keep_gradients", "True"
    ),
    "communication dtype": differs(
        lambda run: setattr(run.optimizer, "communication_dtype", "bfloat16"),
        "communication_dtype",
        "bfloat16",
    ),
    "gather dtype": differs(
        lambda run: setattr(run.optimizer, "gather_dtype", "bfloat16"), "gather_dtype", "bfloat16"
    ),
    "shared parameters": differs(
        lambda run: setattr(run.optimizer, "_share_parameters", True), "share_parameters", "True"
    ),
    "double buffering": differs(
        lambda run: setattr(run.optimizer, "_in_flight", GradientsInFlight()),
        "double_buffering",
        "True",
    ),
    "gathering beside the forward pass": differs(
        lambda run: setattr(
            run.optimizer, "_overlap_gather", OverlapGather(not run.optimizer.overlap_gather)
        ),
        "overlap_gather",
        "(True|False)",
    ),
    "setup": differs(
        lambda run: run.optimizer.setup(run.optimizer.target), r"calls of setup\(\)", "2"
    ),
    "looks before": looks("pre"),
    "looks after": looks("post"),
    "touches gradients": touches("grad", "pre", "gradient"),
    "touches parameters": touches("array", "post", "array"),
    "nan": Kind(
        acts.updates_with_nan,
        r"not finite.*that of /e on rank {rank} \(1 of 66 elements",
        check_finite="error",
    ),
    "nan with dynamic loss scale": Kind(acts.updates_with_nan, prepare=scaled, left_out=True),
    # Before the first update all get what rank 0 has.
    "writes parameters": Kind(
        lambda run: run.optimizer.target.c.array.fill(7), r"/c, float32 .* rank {rank}\b", first=2
    ),
    "writes a frozen parameter": Kind(
        lambda run: run.optimizer.target.c.array.fill(7),
        r"/c, float32 .* rank {rank}\b",
        prepare=lambda run: setattr(run.optimizer.target.c, "update_rule", None),
        first=2,
    ),
    "consolidates alone": alone(lambda run: run.optimizer.consolidate(), "consolidate"),
    "compares alone": alone(lambda run: run.optimizer.check_sync(), r"check_sync\(pers"),
    "saves another step": alone(
        lambda run: acts.save(run, step=77),
        "the save of step 77",
        prepare=lambda run: None if run.is_hit else acts.save(run),
    ),
    "saves asynchronously": alone(
        lambda run: acts.save(run, asynchronous=True),
        "asynchronous save",
        prepare=lambda run: None if run.is_hit else acts.save(run),
    ),
    "saves alone": alone(acts.save, "the save of step"),
    "another order of optimizers": Kind(
        acts.updates_the_first_optimizer_first,
        r"optimizer: number \d of its communicator.* rank {rank}\b",
        prepare=acts.two_optimizers,
    ),
}
for _damage in (acts.flip, acts.cut, acts.remove):
    _name = f"checkpoints: {_damage.__name__} a file"
    _all = acts.starting_again(_damage, SAVED)
    _wrong = r"damaged|missing|No such file|\d bytes, and \d+ were written|cut off"
    KINDS |= {
        f"{_name} of the last": Kind(nothing, prepare=acts.starting_again(_damage, SAVED[-1:])),
        f"{_name} of each": Kind(nothing, rf"step-\d+/\S+: .*({_wrong})", prepare=_all),
    }
_saves = (("a save", False), ("an asynchronous save", True))
for _save, _asynchronous in _saves:
    KINDS |= {
        f"{_save}: no larger files": Kind(
            nothing, prepare=acts.refusing(acts.limited, _asynchronous)
        ),
        f"{_save}: a broken disk": Kind(nothing, prepare=acts.refusing(acts.broken, _asynchronous)),
        f"{_save}: is killed": Kind(
            nothing, prepare=acts.killed_in_a_save(_asynchronous), attempts=2
        ),
    }
KINDS["a save: what comes after it fails"] = Kind(nothing, prepare=acts.failing_after_a_save)
BY_THREADS = list(KINDS)
KINDS |= {
    "is killed": Kind(acts.killed, kill, "it"),
    "is stopped and killed": Kind(acts.stopped_and_killed, kill, "it"),
}
for _save, _asynchronous in _saves:
    KINDS[f"{_save}: a full disk"] = Kind(
        nothing, prepare=acts.refusing(acts.full, _asynchronous), small_disk=True
    )
BY_RANKS = list(KINDS)
