"""What the model is at the moment, on this rank, and the layout that all ranks agree on for it.

A model rarely changes between two updates. What is found out about it is kept, and whether it still
holds is one comparison of identities: of links' parameters, their arrays and their update rules.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smorms3_dist.chainer_internals.links import NamedParameters, arrays_of, device_of_link
from smorms3_dist.chainer_internals.loss_scale import loss_scales_of
from smorms3_dist.chainer_internals.optimizers import RuleWatch, peculiar_rules
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.device.memory import Memory, memory_of
from smorms3_dist.kernels.narrow import narrower
from smorms3_dist.layout import FlatLayout, ParameterSpec, first_difference
from smorms3_dist.sharding import rules

import chainer
import numpy as np
from chainer.backend import CpuDevice, GpuDevice


def memory_of_link(link: chainer.Link, exact: bool) -> Memory:
    """Where the parameters of a model are; see `smorms3_dist.device.memory.memory_of`."""
    return memory_of(device_of_link(link), exact)


class ModelView:
    """The parameters of a link, as they are when this is made; plans of an earlier view are reused.

    With a ``gather_dtype``, they are planned to be sent in that.

    A view lasts from update to update for as long as it `is_current`.

    Attributes:
        link: The model that the optimizer is set up with.
        initialized: The parameters that have an array, by name, sorted; one that several paths lead
            to stands under the first of its names.
        uninitialized: The other parameters, likewise.
        paths: How many paths lead to a parameter, by name.
        plans: How the initialized parameters are updated, by name.
        loss_scale: What the gradients of this step have been multiplied by, or ``None``.
        tied: The parameters that several paths lead to, with the numbers of these.
        kinds: In which ways the initialized parameters are updated.
        rules: The names and update rules of the initialized parameters that have one of Chainer's.
        rules_are_alike: Whether, when `peculiar_rules` was asked, these had no states and nothing
            set them apart.
    """

    kinds: frozenset[rules.Kind]
    rules: list[tuple[str, chainer.UpdateRule]]

    def __init__(
        self,
        link: chainer.Link,
        before: ModelView | None = None,
        gather_dtype: str | None = None,
    ) -> None:
        self.link = link
        self.gather_dtype = gather_dtype
        self._walked = NamedParameters(link)
        walked = self._walked.named
        self._params = [param for _, param in walked]
        self.initialized: dict[str, chainer.Parameter] = {}
        self.uninitialized: dict[str, chainer.Parameter] = {}
        self.paths: dict[str, int] = {}
        names: dict[int, str] = {}
        for name, param in sorted(walked, key=operator.itemgetter(0)):
            first = names.setdefault(id(param), name)
            self.paths[first] = self.paths.get(first, 0) + 1
            if first == name:
                kind = self.uninitialized if param.array is None else self.initialized
                kind[name] = param
        self.tied = {name: count for name, count in self.paths.items() if count > 1}
        self.plans: dict[str, rules.Plan] = {}
        self.loss_scale: float | None = None
        # The arrays after an update: views of flat buffers, which this does not keep alive.
        self._arrays: list[Any] | None = None
        self._structure: list[tuple[str, chainer.Parameter, tuple[int, ...], np.dtype, type]]
        # What plans depend on, as far as it may change: rule, dtype, masters, their whole hook.
        self._seen: dict[str, tuple[Any, np.dtype, bool, str | None, str | None]]
        self._note(before)

    def _note(self, before: ModelView | None = None) -> None:
        seen, plans = ({}, {}) if before is None else (before._seen, before.plans)
        self._structure, self._seen, self.plans, self._arrays = [], {}, {}, None
        # Each access to a parameter's property costs as much as the rest.
        for name, param in self.initialized.items():
            array, rule = param.array, param.update_rule
            self._structure.append((name, param, array.shape, array.dtype, type(array)))
            masters = _masters(rule, array.dtype, self.gather_dtype)
            self._seen[name] = now = (rule, array.dtype, *masters, self.gather_dtype)
            known = plans.get(name)
            if known is None or not all(map(operator.is_, now, seen[name])):
                known = rules.plan(param, self.gather_dtype)
            self.plans[name] = known
        self.kinds = frozenset(plan.kind for plan in self.plans.values())
        self._rules_seen = [rule for rule, *_ in self._seen.values()]
        self.rules = [
            (name, param.update_rule)
            for name, param in self.initialized.items()
            if isinstance(param.update_rule, chainer.UpdateRule)
        ]
        self._watch = RuleWatch(rule for _, rule in self.rules)
        self.rules_are_alike = False
        half = any(dtype == np.float16 for _, dtype, *_ in self._seen.values())
        self._masters_may_change = half or self.gather_dtype is not None

    def __getstate__(self) -> dict[str, Any]:
        # Copies have arrays of their own.
        return {**self.__dict__, "_arrays": None}

    def note_arrays(self) -> None:
        """Remembers which arrays the initialized parameters have after an update."""
        self._arrays = arrays_of(self.initialized.values())

    @property
    def noted_arrays(self) -> Sequence[Any]:
        """What `note_arrays` remembers; the very sequence, in the order of ``initialized``."""
        return self._arrays or ()

    def is_current(self) -> bool:
        """Whether the model is what it was at `note_arrays`, so that this view says all of it.

        Values, and what update rules hold, are not looked at.
        """
        if self._arrays is None or self._masters_may_change:
            return False
        return (
            self._walked.are_current()
            and self._has_arrays(self._arrays)
            # Rules have no meaning of equality but identity.
            and [param.update_rule for param in self.initialized.values()] == self._rules_seen
            and all(param.array is None for param in self.uninitialized.values())
        )

    def arrays_since(self, before: ModelView) -> bool:
        """Whether parameters still have the arrays that an earlier view has noted."""
        return before._arrays is not None and (self is before or self._has_arrays(before._arrays))

    def _has_arrays(self, arrays: Sequence[Any]) -> bool:
        now = arrays_of(self.initialized.values())
        return len(now) == len(arrays) and all(map(operator.is_, now, arrays))

    def plan_again(self) -> None:
        """Takes notice of update rules that have been given to parameters since."""
        self._note(self)

    def peculiar_rules(self) -> list[tuple[str, chainer.UpdateRule]]:
        """The ``rules`` that are disabled, or have hooks or hyperparameters of their own."""
        self.rules_are_alike = self._watch.are_alike()
        return [] if self.rules_are_alike or self._watch.are_plain() else peculiar_rules(self.rules)

    def parameters(self) -> Iterator[tuple[str, chainer.Parameter]]:
        """All parameters, initialized or not, by name; each once."""
        yield from self.initialized.items()
        yield from self.uninitialized.items()

    @functools.cached_property
    def names_in_order(self) -> list[str]:
        """The names in the order of ``link.params()``, a name once for each of its paths.

        It is the order in which Chainer calls hooks; it may differ from that of the names.
        """
        names = {id(param): name for name, param in self.parameters()}
        return [names[id(param)] for param in self.link.params()]

    def in_order(self) -> Iterator[chainer.Parameter]:
        """The initialized parameters in the order of ``link.params()``, each once."""
        for name in dict.fromkeys(self.names_in_order):
            if name in self.initialized:
                yield self.initialized[name]

    def memory(self, exact: bool) -> Memory:
        """Where the parameters are; see `smorms3_dist.device.memory.memory_of`."""
        return memory_of_link(self.link, exact)

    def initialize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Initializes those of the named parameters that are not yet; passes over other names."""
        for name in shapes.keys() & self.uninitialized.keys():
            param = self.uninitialized.pop(name)
            param.initialize(shapes[name])
            # Chainer fills the gradient of a new parameter with nan; here it is one that was not
            # used.
            param.cleargrad()
            self.initialized[name] = param
        self.initialized = dict(sorted(self.initialized.items()))
        self._note(self)

    def same_structure(self, other: ModelView) -> bool:
        """Whether the initialized parameters are the same objects, alike in name, shape, dtype."""
        return self is other or (
            len(self._structure) == len(other._structure)
            and all(
                # A parameter has no meaning of equality but identity.
                mine[1] is others[1] and mine[0] == others[0] and mine[2:] == others[2:]
                for mine, others in zip(self._structure, other._structure, strict=True)
            )
        )

    def same_plans(self, other: ModelView) -> bool:
        """Whether the initialized parameters are updated in the same ways."""
        return self is other or self.plans == other.plans

    def specs(self) -> list[ParameterSpec]:
        """The initialized parameters as all ranks have to agree on them."""
        return [
            ParameterSpec(name, tuple(shape), dtype.name, self.plans[name].label)
            for name, _, shape, dtype, _ in self._structure
        ]

    def note_loss_scale(self, current: float | None, used: bool) -> None:
        """Finds out what the gradients of this step have been multiplied by.

        The backward pass notes that in the parameters that it reaches. One that was not used has
        nothing noted, or what an earlier step used; its gradient may come from other ranks.

        Args:
            current: The scale that the optimizer has.
            used: Whether the gradients were computed with it for sure.
        """
        noted: set[Any] = loss_scales_of(self._params) - {None}
        if noted:
            # What an earlier step used stays where there is no gradient now.
            with_gradient = (p for p in self.initialized.values() if p.grad is not None)
            noted = loss_scales_of(with_gradient) - {None}
        if used or current in noted:
            self.loss_scale = current
        else:
            self.loss_scale = max(noted, default=None)


def _masters(rule: Any, dtype: np.dtype, gather_dtype: str | None) -> tuple[bool, str | None]:
    """Whether there are masters, and which hook wants to see them whole."""
    seen = narrower(gather_dtype, dtype) is not None
    if not (seen or dtype == np.float16) or not isinstance(rule, chainer.UpdateRule):
        return False, None
    wide = seen or rules.update_dtype(rule, dtype) != dtype
    return wide, rules.whole_hook(rule) if wide else None


def check_parameters(link: chainer.Link) -> None:
    """Refuses a link whose parameters cannot be updated here, before anything is changed.

    Raises:
        TypeError: If a parameter is neither a NumPy nor a CuPy array, or of no floating dtype.
        ValueError: If there are no parameters, or they lie on several devices.
    """
    params = sorted(link.namedparams(), key=lambda item: item[0])
    if not params:
        raise ValueError(
            f"the link {link.name or type(link).__name__} has no parameters to update; pass the "
            "whole model to setup()"
        )
    where: dict[str, str] = {}
    for name, param in params:
        where.setdefault(str(param.device), name)
        # Of an uninitialized parameter the dtype may not be known yet.
        if param.array is not None and param.dtype.kind != "f":
            raise TypeError(
                f"parameter {name} has dtype {param.dtype}; only float16, float32 and float64 "
                "parameters can be updated. Register it as a persistent value instead"
            )
    if len(where) > 1:
        (one, first), (other, second) = list(where.items())[:2]
        raise ValueError(
            f"parameters lie on several devices: {first} on {one}, {second} on {other}. Move the "
            "whole model to one with model.to_device()"
        )
    for name, param in params:
        if not isinstance(param.device, (CpuDevice, GpuDevice)):
            raise TypeError(
                f"parameter {name} is on device {param.device}; only NumPy and CuPy arrays are "
                "supported. Move the model with model.to_device('@numpy') or '@cupy:0'"
            )


def agree_on_layout(
    model: ModelView, collectives: Collectives, memory: Memory, bucket_bytes: int | None = None
) -> FlatLayout:
    """Makes the layout that all ranks agree on. Collective.

    Buckets have so many bytes at most, by default as many as the memory wants.

    A parameter that some ranks have initialized and others not yet is initialized on those, too;
    its values are to be broadcast afterwards.

    Raises:
        RuntimeError: If the ranks' models differ, naming the first parameter and the ranks; or no
            parameter is initialized.
    """
    for theirs in collectives.all_gather_object(model.specs()):
        model.initialize({spec.name: spec.shape for spec in theirs})
    specs = model.specs()
    bucket_bytes = bucket_bytes or memory.bucket_bytes_of(collectives.size)
    layout = FlatLayout(specs, collectives.size, bucket_bytes, memory.dense)
    fingerprints = collectives.all_gather_object(layout.fingerprint)
    if len(set(fingerprints)) > 1:
        _raise_difference(collectives.all_gather_object(layout.specs))
    if not specs:
        raise RuntimeError(
            "the target link has no initialized parameter to update; check that setup() got the "
            "whole model"
        )
    return layout


def _raise_difference(specs_by_rank: list[tuple[ParameterSpec, ...]]) -> None:
    for rank, specs in enumerate(specs_by_rank):
        difference = first_difference(specs_by_rank[0], specs)
        if difference is not None:
            on_root, on_rank = _describe(*difference)
            name = next(spec.name for spec in difference if spec is not None)
            raise RuntimeError(
                f"the ranks have different models: parameter {name} is {on_root} on rank 0 and "
                f"{on_rank} on rank {rank}. Build the same model on every rank"
            )


def _describe(*specs: ParameterSpec | None) -> list[str]:
    """Says what sets two parameters apart."""
    alike = len({spec and spec[:3] for spec in specs}) == 1
    return [
        "missing"
        if spec is None
        else f"updated by {spec.update}"
        if alike
        else f"{spec.dtype} of shape {spec.shape}"
        for spec in specs
    ]
