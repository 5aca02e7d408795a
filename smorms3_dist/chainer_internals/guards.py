"""Guards: whoever asks a parameter for its array waits first, whoever it is.

A variable keeps its array in a list, from which everybody takes it: functions, extensions,
serializers, other threads, copies of the parameter, which have the list in common. Two more things
of a parameter hold the array: its node in a graph, if a function wants to have it again for the
backward pass, and its initializer, if it was made of an array.

All three are of classes that can be exchanged for ones that wait, and back: an object that is not
waited for any more is as it was. What holds the array besides them, or a view of it, cannot be made
to wait; but it is seen, by counts of references.
"""

from __future__ import annotations

import collections
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from smorms3_dist.references import holders

import chainer

Wait = Callable[[], bool]
"""Waits until an array may be read and written to; returns whether nobody has to wait any more."""

_lock = threading.RLock()


class _Slot(list[Any]):
    """A variable's list, of a class that can be exchanged."""

    __slots__ = ("wait",)

    wait: Wait | None


class _WaitingSlot(_Slot):
    """The list of a variable whose array must not be seen yet."""

    __slots__ = ()


# What takes an array from its list, and looks at what it is, but not at its values: so a loop may
# clear gradients before the forward pass.
_LOOKS = frozenset(
    getattr(kind, name).fget.__code__
    for kind, name in (
        (chainer.Parameter, "is_initialized"),
        (chainer.Parameter, "dtype"),
        (chainer.Variable, "dtype"),
        (chainer.Variable, "shape"),
        (chainer.Variable, "ndim"),
        (chainer.Variable, "size"),
        (chainer.Variable, "device"),
    )
)


def _waiting(name: str) -> Callable[..., Any]:
    method = getattr(list, name)

    @functools.wraps(method)
    def wait_first(self: _WaitingSlot, *args: Any, **kwds: Any) -> Any:
        if sys._getframe(1).f_code not in _LOOKS:
            _take_off(self, _Slot, getattr(self, "wait", None), _forget_of_slot)
        return method(self, *args, **kwds)

    return wait_first


_AS_THEY_ARE = ("__new__", "__init__", "__getattribute__", "__class_getitem__")

for _name, _method in vars(list).items():
    if callable(_method) and _name not in _AS_THEY_ARE:
        setattr(_WaitingSlot, _name, _waiting(_name))


def _reduce(slot: _WaitingSlot, protocol: Any) -> tuple[Any, ...]:
    # Nobody has to wait for a copy.
    return _Slot, (list(slot),)


_WaitingSlot.__reduce_ex__ = _reduce  # type: ignore[assignment]


def _forget_of_slot(slot: _Slot) -> None:
    slot.wait = None


def _take_off(guarded: Any, plain: type, wait: Wait | None, forget: Callable[[Any], None]) -> None:
    """Waits, and takes a guard off, if it is still the same."""
    if wait is not None and wait():
        with _lock:
            if _wait_of(guarded) is wait:
                guarded.__class__ = plain
                forget(guarded)


def _wait_of(guarded: Any) -> Wait | None:
    if isinstance(guarded, _Slot):
        return getattr(guarded, "wait", None)
    wait: Wait | None = vars(guarded).get(_KEY)
    return wait


_KEY = "_smorms3_dist_wait"


@functools.cache
def _waiting_class(kind: type, name: str) -> type:
    """A class like another, of whose objects one attribute must not be seen yet."""

    def take_off(self: Any) -> None:
        _take_off(self, kind, _wait_of(self), lambda guarded: vars(guarded).pop(_KEY))

    def read(self: Any) -> Any:
        take_off(self)
        return vars(self)[name]

    def write(self: Any, value: Any) -> None:
        take_off(self)
        vars(self)[name] = value

    own = {name: property(read, write), "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), own)


class Guarded(NamedTuple):
    """A parameter with a guard.

    Attributes:
        wait: What is waited for.
        objects: What has to be set right when nobody has to wait any more: objects, and their
            classes.
    """

    wait: Wait
    objects: list[tuple[Any, type]]

    def take_off(self) -> None:
        """Takes the guard off, where nobody has waited yet."""
        for guarded, plain in self.objects:
            with _lock:
                if _wait_of(guarded) is self.wait:
                    guarded.__class__ = plain
                    if isinstance(guarded, _Slot):
                        guarded.wait = None
                    else:
                        vars(guarded).pop(_KEY)


def put_on(param: chainer.Parameter, wait: Wait) -> Guarded:
    """Puts a guard on a parameter of which `are_held` says that nobody else has its array."""
    own = vars(param)
    slot, node, array = own["_data"], own["_node"], list.__getitem__(own["_data"], 0)
    objects: list[tuple[Any, type]] = [(slot, _Slot)]
    slot.wait = wait
    slot.__class__ = _WaitingSlot
    for holder, name in ((node, "_data"), (param, "initializer")):
        if vars(holder).get(name) is array:
            objects.append((holder, type(holder)))
            vars(holder)[_KEY] = wait
            kind: Any = type(holder)
            holder.__class__ = _waiting_class(kind, name)
    return Guarded(wait, objects)


def make_guardable(params: Iterable[chainer.Parameter]) -> None:
    """Gives parameters lists that guards can be put on, where no copies have them in common."""
    for param in params:
        own = vars(param)
        slot = own["_data"]
        # By the parameter, and the name here.
        if type(slot) is list and holders([slot]) == [2]:
            own["_data"] = _Slot(slot)


def are_held(
    params: Sequence[chainer.Parameter],
    arrays: Sequence[Any],
    known: Sequence[Any],
    is_seen_otherwise: Callable[[Any], bool] = lambda array: False,
) -> list[bool]:
    """Whether somebody has arrays of parameters, or views of them, apart from the parameters.

    Args:
        params: The parameters.
        arrays: Their arrays. The sequence is one that has them, and is counted.
        known: Another sequence that has arrays, and is counted.
        is_seen_otherwise: Whether there are views of an array that do not refer to it.
    """
    make_guardable(params)
    counts = holders(arrays)
    known_ids = collections.Counter(map(id, known))
    answers = []
    seen = map(is_seen_otherwise, arrays)
    for param, identity, count, is_seen in zip(params, map(id, arrays), counts, seen, strict=True):
        own = vars(param)
        slot, node = own["_data"], vars(own["_node"])
        expected = 1 + known_ids[identity]
        expected += id(node.get("_data")) == identity
        expected += id(own.get("initializer")) == identity
        right = type(slot) is _Slot and id(list.__getitem__(slot, 0)) == identity
        answers.append(is_seen or not right or count > expected)
    return answers
