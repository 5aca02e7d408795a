"""What the model is at the moment, on this rank, and the layout that all ranks agree on for it."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.layout import FlatLayout, ParameterSpec, first_difference

import chainer
import numpy as np
from chainer.backend import CpuDevice


class ModelView:
    """The parameters of a link, as they are when this is made.

    Args:
        link: The model.

    Attributes:
        initialized: The parameters that have an array, by name, sorted; one that several paths lead
            to stands under the first of its names.
        uninitialized: The other parameters, likewise.
        times: How many paths lead to a parameter, by ``id``.
    """

    def __init__(self, link: chainer.Link) -> None:
        self.initialized: dict[str, chainer.Parameter] = {}
        self.uninitialized: dict[str, chainer.Parameter] = {}
        self.times: collections.Counter[int] = collections.Counter()
        for name, param in sorted(link.namedparams(), key=lambda item: item[0]):
            self.times[id(param)] += 1
            if self.times[id(param)] == 1:
                kind = self.uninitialized if param.array is None else self.initialized
                kind[name] = param
        self._structure: list[tuple[str, chainer.Parameter, tuple[int, ...], np.dtype]] = []
        self._note_structure()

    def _note_structure(self) -> None:
        self._structure = [
            (name, param, param.shape, param.dtype) for name, param in self.initialized.items()
        ]

    def initialize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Initializes those of the given parameters that are not yet.

        Args:
            shapes: Shapes by name; names that are not there are passed over.
        """
        for name in shapes.keys() & self.uninitialized.keys():
            param = self.uninitialized.pop(name)
            param.initialize(shapes[name])
            # Chainer fills the gradient of a new parameter with nan; here it is one that was not
            # used.
            param.cleargrad()
            self.initialized[name] = param
        self.initialized = dict(sorted(self.initialized.items()))
        self._note_structure()

    def same_structure(self, other: ModelView) -> bool:
        """Whether the initialized parameters are the same objects, alike in name, shape, dtype."""
        return len(self._structure) == len(other._structure) and all(
            name == old_name and param is old_param and shape == old_shape and dtype == old_dtype
            for (name, param, shape, dtype), (old_name, old_param, old_shape, old_dtype) in zip(
                self._structure, other._structure, strict=True
            )
        )

    def specs(self) -> list[ParameterSpec]:
        """The initialized parameters as all ranks have to agree on them.

        Raises:
            TypeError: If one is not in host memory.
        """
        for name, param in self.initialized.items():
            if not isinstance(param.device, CpuDevice):
                raise TypeError(
                    f"parameter {name} is on device {param.device}; only parameters in host memory"
                    " are supported yet. Move the model back with model.to_device('@numpy')"
                )
        return [
            ParameterSpec(name, tuple(shape), dtype.name)
            for name, _, shape, dtype in self._structure
        ]

    def loss_scale(self) -> float | None:
        """The scale of the gradients that the backward pass noted, or ``None``.

        A parameter that was not used has none of its own, although its gradient on other ranks may
        be scaled.
        """
        scales = (param._loss_scale for param in self.initialized.values())
        return next((scale for scale in scales if scale is not None), None)

    def enabled(self) -> Iterator[chainer.Parameter]:
        """The initialized parameters that are updated."""
        for param in self.initialized.values():
            if param.update_rule is not None and param.update_rule.enabled:
                yield param


def agree_on_layout(model: ModelView, collectives: Collectives) -> FlatLayout:
    """Makes the layout that all ranks agree on. Collective.

    A parameter that some ranks have initialized and others not yet is initialized on those, too;
    its values are to be broadcast afterwards.

    Args:
        model: The model on this rank; updated where parameters are initialized here.
        collectives: The ranks.

    Returns:
        The layout of all initialized parameters.

    Raises:
        RuntimeError: If the ranks' models differ, naming the first parameter and the ranks; or no
            parameter is initialized.
        TypeError: If a parameter is not in host memory.
    """
    for theirs in collectives.all_gather_object(model.specs()):
        model.initialize({spec.name: spec.shape for spec in theirs})
    specs = model.specs()
    layout = FlatLayout(specs, collectives.size)
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
            on_root, on_rank = map(_describe, difference)
            name = next(spec.name for spec in difference if spec is not None)
            raise RuntimeError(
                f"the ranks have different models: parameter {name} is {on_root} on rank 0 and "
                f"{on_rank} on rank {rank}. Build the same model on every rank"
            )


def _describe(spec: ParameterSpec | None) -> str:
    return "missing" if spec is None else f"{spec.dtype} of shape {spec.shape}"
