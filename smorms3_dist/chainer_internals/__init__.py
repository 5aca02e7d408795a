"""The only room that touches what Chainer 7.8.1 keeps to itself.

A sharded optimizer does, at other moments and on parts of arrays, what Chainer does inside of
``Optimizer.update`` and ``UpdateRule.update``. Chainer has no public names for some of what it
needs for that: whether a gradient was finite, the fp32 master of a float16 parameter, the hooks
that are registered. All of it is read and written here, in words of this package, and nowhere else.
`guards` lets whoever asks a parameter for its array wait.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import operator
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chainer
import numpy as np
from chainer.training import extensions
from chainer.training import trainer as trainer_module
from chainer.training.extensions import _snapshot
from chainer.training.triggers import BestValueTrigger, EarlyStoppingTrigger
from chainermn.extensions._multi_node_snapshot import _MultiNodeSnapshot
from chainermn.extensions.checkpoint import _MultiNodeCheckpointer

# Hooks of an optimizer or of an update rule


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


# Arrays of parameters, at a fraction of what their properties take


def arrays_of(params: Iterable[chainer.Parameter]) -> list[Any]:
    """The arrays of parameters."""
    return [param._data[0] for param in params]


def arrays_within(link: chainer.Link) -> list[Any]:
    """The arrays of the parameters of a link and of all in it, in no order."""
    everywhere: list[Any] = list(link.links())
    if any(type(each).params not in _PARAMS for each in everywhere):
        return arrays_of(link.params())
    return [own[name]._data[0] for own in map(vars, everywhere) for name in own["_params"]]


def gradients_of(params: Iterable[chainer.Parameter]) -> list[Any]:
    """The gradients of parameters that are NumPy's or CuPy's, each ``None`` if it has none.

    Raises:
        RuntimeError: If one was never set nor cleared.
    """
    return [
        param._grad
        if param._grad_valid and param._grad_var is None and param._layout is None
        else param.grad
        for param in params
    ]


def clear_gradients_of(params: Iterable[chainer.Parameter]) -> None:
    """Leaves parameters that are NumPy's or CuPy's without a gradient."""
    for param in params:
        param._grad = param._grad_var = None
        param._grad_valid = True


# States of update rules


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


# The loss scale


class LossScaling(NamedTuple):
    """The loss scale of an optimizer, as far as it is kept in snapshots and checkpoints.

    Attributes:
        scale: What losses are multiplied by.
        dynamic: Whether it follows what becomes of the gradients.
        was_too_large: Whether a gradient was ever not finite because of it.
    """

    scale: float
    dynamic: bool
    was_too_large: bool

    @classmethod
    def of(cls, optimizer: chainer.GradientMethod) -> LossScaling | None:
        """That of an optimizer; ``None`` if losses are not scaled."""
        scale = loss_scale_of(optimizer)
        if scale is None:
            return None
        dynamic = is_loss_scale_dynamic(optimizer)
        return cls(float(scale), dynamic, dynamic and bool(optimizer._loss_scaling_isnan_ever))

    def restore(self, optimizer: chainer.GradientMethod) -> None:
        """Goes on with a dynamic scale; a static one is a setting, which the script may change."""
        if self.dynamic and is_loss_scale_dynamic(optimizer):
            optimizer._loss_scale = self.scale
            optimizer._loss_scaling_isnan_ever = self.was_too_large
        elif not self.dynamic and loss_scale_of(optimizer) is None:
            optimizer._loss_scale = self.scale


def loss_scale_of(owner: Any) -> float | None:
    """What an optimizer multiplies losses by; or what the gradient of a parameter still has."""
    return owner._loss_scale


def loss_scales_of(params: Iterable[chainer.Parameter]) -> set[float | None]:
    """What the gradients of parameters still have been multiplied by."""
    return {param._loss_scale for param in params}


def note_loss_scale(param: chainer.Parameter, scale: float | None) -> None:
    """Notes what the gradient of a parameter has been multiplied by, for hooks and rules."""
    param._loss_scale = scale


def is_loss_scale_dynamic(optimizer: chainer.GradientMethod) -> bool:
    """Whether the loss scale follows what becomes of the gradients."""
    return bool(optimizer._loss_scaling_is_dynamic)


def interval_of_loss_scale(optimizer: chainer.GradientMethod) -> float:
    """What a dynamic loss scale grows by in each step: two to the power of 1/interval."""
    return float(optimizer._loss_scaling_multiplier)


def note_finite(optimizer: chainer.GradientMethod, finite: bool) -> None:
    """Tells an optimizer whether the gradients of this step are finite.

    ``is_safe_to_update`` and ``update_loss_scale`` go by that.
    """
    optimizer._loss_scaling_isnan = not finite
    if not finite:
        optimizer._loss_scaling_isnan_ever = True


# Links


def device_of_link(link: chainer.Link) -> chainer.backend.Device:
    """The device of a link's parameters, without bringing all of them into their order."""
    own: Any = link
    name = next(iter(own._params), None) if type(link).params in _PARAMS else None
    param = next(iter(link.params()), None) if name is None else vars(link)[name]
    # While it is serialized `without_parameters` it has none.
    return link.device if param is None else param.device


class NamedParameters:
    """What ``namedparams`` of a link gives, and whether it would give the same again.

    Attributes:
        named: The paths and the parameters.
    """

    def __init__(self, link: chainer.Link) -> None:
        self.named = list(link.namedparams())
        self._link = link
        # What each link in it has: its attributes, and among these the names of its parameters, its
        # children, and all these by name. None if one of them gives parameters in its own way.
        self._parts: list[_Part] | None = []
        if not all(map(self._note, link.links())):
            self._parts = None

    def _note(self, link: chainer.Link) -> bool:
        own = vars(link)
        if type(link).namedparams not in _NAMEDPARAMS or "namedparams" in own:
            return False
        params, children = set(own["_params"]), own.get("_children", ())
        names = [*params, *(children if isinstance(link, chainer.Chain) else ())]
        assert self._parts is not None
        # One of them twice: of a single name there would be no tuple.
        look = operator.itemgetter(names[0], *names) if names else _nothing
        self._parts.append((own, params, copy.copy(children), look, look(own)))
        return True

    def __getstate__(self) -> dict[str, Any]:
        # Copies have attributes of their own.
        return {**self.__dict__, "_parts": None}

    def are_current(self) -> bool:
        """Whether the link's parameters are the same objects, by the same paths."""
        if self._parts is None:
            walked = list(self._link.namedparams())
            return len(walked) == len(self.named) and all(
                path == known and param is before
                for (path, param), (known, before) in zip(walked, self.named, strict=True)
            )
        try:
            return all(
                own["_params"] == params
                and own.get("_children", ()) == children
                and look(own) == members
                for own, params, children, look, members in self._parts
            )
        except (KeyError, TypeError):
            # A member is missing; or it is another, for parameters refuse to be compared.
            return False


def _nothing(_own: object) -> tuple[()]:
    return ()


_Part = tuple[dict[str, Any], set[str], Any, Callable[[Any], tuple[Any, ...]], tuple[Any, ...]]

_PARAMS = {kind.params for kind in (chainer.Link, chainer.Chain, chainer.ChainList)}
_NAMEDPARAMS = {kind.namedparams for kind in (chainer.Link, chainer.Chain, chainer.ChainList)}


@contextlib.contextmanager
def without_parameters(links: Iterable[chainer.Link]) -> Iterator[None]:
    """Lets links be serialized without parameters: these are neither written nor asked for.

    Whatever else is serialized meanwhile finds them where they are. A serializer that has a method
    ``pass_over`` is given the path of each link with the names of those that have arrays instead,
    and asked about the others.
    """
    distinct = {id(link): link for link in links}.values()
    before = [(vars(link), vars(link).get("serialize")) for link in distinct]
    try:
        for link in distinct:
            vars(link)["serialize"] = functools.partial(_serialize_rest, link, link.serialize)
        yield
    finally:
        for own, serialize in before:
            own["serialize"] = serialize
            if serialize is None:
                del own["serialize"]


_SERIALIZE = {kind.serialize for kind in (chainer.Link, chainer.Chain, chainer.ChainList)}


def _serialize_rest(link: chainer.Link, serialize: Callable[[Any], None], serializer: Any) -> None:
    """Serializes a link without its parameters, as one that has none."""
    everywhere: list[tuple[str, Any]] = list(link.namedlinks())
    pass_over = getattr(serializer, "pass_over", None)
    if pass_over is not None:
        own_ways = (vars(each) for _, each in everywhere if each is not link)
        if not {type(each).serialize for _, each in everywhere} <= _SERIALIZE or any(
            "serialize" in own for own in own_ways
        ):
            # What it writes under which path is its own business.
            serialize(serializer)
            return
    params = {id(each): (each, each._params) for _, each in everywhere}
    try:
        for each, names in params.values():
            own, each._params = vars(each), set()
            if pass_over is not None:
                each._params = {name for name in names if own[name]._data[0] is None}
        if pass_over is not None:
            for path, each in everywhere:
                pass_over(path.strip("/"), params[id(each)][1] - each._params)
        serialize(serializer)
    finally:
        for each, names in params.values():
            each._params = names


def persistent_values_of(link: chainer.Link) -> Iterator[tuple[str, chainer.Link, str]]:
    """The persistent values of a link and of all in it: path, the link that has it, its name there.

    They come in the order of the links' paths; a link that several paths lead to, once.
    """
    seen = set()
    for path, owner in sorted(link.namedlinks(), key=lambda item: item[0]):
        if id(owner) not in seen:
            seen.add(id(owner))
            for name in sorted(owner._persistent):
                yield f"{path.rstrip('/')}/{name}", owner, name


# Serializers


def is_missing(serializer: Any) -> bool:
    """Whether this is the deserializer of a group that an HDF5 file does not have.

    It can be asked for nothing: not for values, as those of other formats can, nor for groups.
    """
    return getattr(serializer, "group", serializer) is None


# Trainers and their extensions


def iterators_of(updater: Any) -> Mapping[str, Any]:
    """The iterators of an updater by name; none if it keeps them in a way of its own."""
    return getattr(updater, "_iterators", {})


def entries_of(trainer: chainer.training.Trainer) -> Iterator[Any]:
    """A trainer's entries of its extensions, with ``extension`` and ``trigger``."""
    return iter(trainer._extensions.values())


def put_before(trainer: chainer.training.Trainer, followers: Collection[str]) -> None:
    """Puts the extension that a trainer was extended with last before some others of its priority.

    Args:
        trainer: The trainer.
        followers: The names of these others, some of which the trainer need not have.
    """
    *others, _last = trainer._extensions
    for name in itertools.dropwhile(lambda name: name not in followers, others):
        trainer._extensions.move_to_end(name)


def own_random_state_of(iterator: Any) -> np.random.RandomState | None:
    """What an iterator draws its orders from, unless that is NumPy's global random numbers."""
    random = getattr(getattr(iterator, "order_sampler", None), "_random", None)
    # NumPy's global numbers, and none in old versions of Chainer.
    if random is getattr(np.random.random, "__self__", None):
        return None
    return random if isinstance(random, np.random.RandomState) else None


def unsaved_parts(extension: Any) -> Iterator[tuple[str, Any]]:
    """Parts of an extension of Chainer's that have a state which it does not save."""
    if isinstance(extension, _UNSAVED):
        for name in ("_trigger", "_summary"):
            part = getattr(extension, name, None)
            if hasattr(part, "serialize"):
                yield name, part


def reads_gradients(extension: Any) -> bool:
    """Whether this is Chainer's extension that reads gradients, and it does."""
    return isinstance(extension, extensions.ParameterStatistics) and "grad" in extension._attrs


_UNSAVED = (extensions.PlotReport, extensions.ParameterStatistics)


def shift_of(extension: Any) -> tuple[str, Any] | None:
    """The attribute and the optimizer of an extension that starts anew from the initial value."""
    if isinstance(extension, (extensions.MultistepShift, extensions.WarmupShift)):
        return extension._attr, extension._optimizer
    return None


@contextlib.contextmanager
def as_if_started(objects: Iterable[Any]) -> Iterator[None]:
    """Lets trainers among objects be saved that do not run yet."""
    waiting = [
        each
        for each in objects
        if isinstance(each, chainer.training.Trainer) and each._start_at is None
    ]
    for trainer in waiting:
        trainer._start_at = trainer_module._get_time()
    try:
        yield
    finally:
        for trainer in waiting:
            trainer._start_at = None


def call_before_training(hook: Callable[[chainer.training.Trainer], None]) -> None:
    """Lets a hook be called with each trainer before it initializes its extensions."""
    trainer_class: Any = chainer.training.Trainer
    run = trainer_class.run

    @functools.wraps(run)
    def run_after_hook(self: Any, *args: Any, **kwds: Any) -> Any:
        hook(self)
        return run(self, *args, **kwds)

    trainer_class.run = run_after_hook


def check_trigger_of(trigger: Any) -> Any | None:
    """By which trigger one on a value looks at the value; ``None`` if it is no such trigger."""
    return trigger._interval_trigger if isinstance(trigger, BestValueTrigger) else None


class EarlyStoppingState(NamedTuple):
    """Parts of a trigger that stops early.

    Attributes:
        look: By which trigger it looks at the value.
        limit: The trigger that ends the training in any case.
    """

    look: Any
    limit: Any

    @classmethod
    def of(cls, trigger: EarlyStoppingTrigger) -> EarlyStoppingState:
        """Those of a trigger."""
        return cls(trigger._interval_trigger, trigger._max_trigger)


def serialize_early_stopping(trigger: EarlyStoppingTrigger, serializer: Any) -> None:
    """Writes or reads how far a trigger that stops early has come, which Chainer does not."""
    trigger.count = int(serializer("count", trigger.count))
    trigger.best = float(serializer("best", trigger.best))
    trigger._summary.serialize(serializer["summary"])
    for name in ("_interval_trigger", "_max_trigger"):
        part = getattr(trigger, name)
        if hasattr(part, "serialize"):
            part.serialize(serializer[name.strip("_")])


def is_snapshot(extension: Any) -> bool:
    """Whether this is Chainer's snapshot extension, which saves one rank alone."""
    return isinstance(extension, _snapshot._Snapshot)


def snapshot_of_replica_sets(extension: Any) -> Any | None:
    """Chainer's snapshot extension in ChainerMN's that saves one rank of each of its sets."""
    return extension.snapshot if isinstance(extension, _MultiNodeSnapshot) else None


def saves_on_error(extension: Any) -> bool:
    """Whether a snapshot extension of Chainer's saves when the training fails."""
    return bool(extension._snapshot_on_error)


def newest_snapshot(filename: Any, directory: str) -> str | None:
    """The newest snapshot in a directory, by the name that the snapshot extension gives them."""
    return _snapshot._find_latest_snapshot(filename, directory)


def target_of(extension: Any) -> Any | None:
    """What a snapshot extension of Chainer's saves; ``None`` for the trainer."""
    return extension._target


def is_in_snapshot_extension() -> bool:
    """Whether Chainer's snapshot extension, which saves one rank alone, is at work now."""
    return _is_being_called(_snapshot._Snapshot._make_snapshot)


def is_in_multi_node_checkpointer() -> bool:
    """Whether ChainerMN's multi-node checkpointer, which saves every rank, is at work now."""
    return _is_being_called(_MultiNodeCheckpointer.save)


def _is_being_called(method: Any) -> bool:
    """Whether a method is being executed further up in this thread."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is method.__code__:
            return True
        frame = frame.f_back
    return False
