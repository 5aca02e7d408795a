"""What makes a wrapper look like the Chainer optimizer that it wraps.

Its attributes and its class are those of the wrapped one; copies and pickles hold both, and a
communicator can be given to what comes from a pickle.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.collectives.connect import connect
from smorms3_dist.phases import Phases
from smorms3_dist.sharding.sharded_model import ShardedModel

import chainer


class OptimizerWrapper:
    """A Chainer optimizer together with a communicator, in the place of the optimizer.

    Attributes that a wrapper does not declare in its classes are those of the wrapped optimizer, to
    read and to write: ``t``, ``epoch``, ``lr``, ``eps``, ``target``, ``add_hook`` and so on. Where
    it is asked for by ``isinstance``, it is a ``chainer.Optimizer`` and of the wrapped optimizer's
    class as well.

    It can be copied (the copy uses the same communicator) and pickled on every rank (the restored
    one has this rank's shard, and no communicator until one is assigned to ``communicator``).

    Args:
        actual_optimizer: The optimizer to wrap.
        communicator: A ChainerMN communicator, another object with its interface, or an mpi4py
            communicator.

    Attributes:
        actual_optimizer: The wrapped Chainer optimizer, which hooks receive.
    """

    actual_optimizer: chainer.GradientMethod
    _communicator: Any
    # In use; and on host memory, as the communicator has it. The same if the model is there.
    _collectives: Collectives | None
    _host_collectives: Collectives | None
    # One cell, shared with copies of this optimizer.
    _model_cell: list[ShardedModel | None]
    # Attributes of the wrapper; all others are the wrapped optimizer's.
    _own: ClassVar[frozenset[str]]

    def __init_subclass__(cls) -> None:
        declared = [inspect.get_annotations(base) for base in cls.__mro__]
        cls._own = frozenset({"communicator"}.union(*declared))

    def __init__(self, actual_optimizer: chainer.GradientMethod, communicator: Any) -> None:
        self.actual_optimizer = actual_optimizer
        self._model_cell = [None]
        self.communicator = communicator

    def __getattr__(self, name: str) -> Any:
        if name in self._own or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        try:
            return getattr(self.actual_optimizer, name)
        except RuntimeError as error:
            if self.actual_optimizer.t:
                raise
            raise RuntimeError(
                f"{error} The first update broadcasts, and makes no step: look at {name} from the "
                "second one on, or make the optimizer with step_after_broadcast=True"
            ) from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            object.__setattr__(self, name, value)
        else:
            setattr(self.actual_optimizer, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the wrapped optimizer: as which ``isinstance`` takes this one, too."""
        actual = vars(self).get("actual_optimizer")
        return type(self) if actual is None else type(actual)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *vars(self), *dir(self.actual_optimizer)})

    def __repr__(self) -> str:
        where = (
            "without a communicator"
            if self._collectives is None
            else f"rank {self._collectives.rank} of {self._collectives.size}"
        )
        return f"<{type(self).__name__} of {type(self.actual_optimizer).__name__}, {where}>"

    def __copy__(self) -> OptimizerWrapper:
        twin = object.__new__(type(self))
        twin.__dict__.update(self._carried())
        # As a copied Chainer optimizer: t and epoch of its own; target, rules and states, wherever
        # these are, in common.
        twin.actual_optimizer = copy.copy(self.actual_optimizer)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerWrapper:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for own in (self._communicator, self._collectives, self._host_collectives):
            memo[id(own)] = own
        twin.__dict__.update(copy.deepcopy(self._carried(), memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # What Chainer's classes would be restored as: `__class__` is not this one.
        return object.__new__, (type(self),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        nothing = {"_communicator": None, "_collectives": None, "_host_collectives": None}
        return {**self._carried(), **nothing}

    def _carried(self) -> dict[str, Any]:
        """What copies and pickles take over."""
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def communicator(self) -> Any:
        """What the user gave as communicator; ``None`` after unpickling, until it is assigned.

        Raises:
            TypeError: On assignment of anything that is no communicator.
            ValueError: On assignment of a communicator of another size, or in which this process
                has another rank, than the one with which the states were sharded.
        """
        return self._communicator

    @communicator.setter
    def communicator(self, communicator: Any) -> None:
        collectives = connect(communicator)
        sharded = self._model_cell[0]
        if sharded is not None:
            size, rank = sharded.layout.world_size, sharded.rank
            if (collectives.size, collectives.rank) != (size, rank):
                raise ValueError(
                    f"the states of this optimizer are shard {rank} of {size}, but in the new "
                    f"communicator this process is rank {collectives.rank} of {collectives.size}. "
                    "Use a communicator of the same size, in the same order"
                )
        self._communicator = communicator
        self._collectives = self._host_collectives = collectives

    @property
    def collectives(self) -> Collectives:
        """The collectives in use; ``collectives.bytes_sent`` counts what this rank has sent.

        Raises:
            RuntimeError: After unpickling, before a communicator has been assigned.
        """
        if self._collectives is None:
            raise RuntimeError(
                "this optimizer was restored from a pickle and has no communicator; assign one: "
                "optimizer.communicator = chainermn.create_communicator(...)"
            )
        return self._collectives

    @property
    def phases(self) -> Phases:
        """Where the time of this rank goes."""
        return self.collectives.phases
