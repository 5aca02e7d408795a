"""Guards of parameters: what waits, and what is seen of who does not."""

from __future__ import annotations

import copy
import pickle

import smorms3_dist  # noqa: F401  (patches Chainer)
from smorms3_dist.chainer_internals import guards

import chainer
import numpy as np


def test_every_method_of_a_list_waits() -> None:
    param = chainer.Parameter(np.zeros(3, np.float32))
    guards.make_guardable([param])
    as_they_are = {"__new__", "__init__", "__getattribute__", "__class_getitem__", "__doc__"}
    waiting = vars(guards._WaitingSlot)
    for name, method in vars(list).items():
        if callable(method) and name not in as_they_are:
            assert name in waiting, name
    waited = []

    def wait() -> bool:
        waited.append(1)
        return True

    guard = guards.put_on(param, wait)
    assert next(iter(param._data)) is param.array
    assert len(waited) == 1
    guard.take_off()
    assert copy.copy(param._data) == list(param._data)


def test_a_guard_stays_on_until_nobody_has_to_wait_any_more_and_copies_have_none() -> None:
    param = chainer.Parameter(np.arange(3, dtype=np.float32))
    guards.make_guardable([param])
    is_there, waited = [False], []

    def wait() -> bool:
        waited.append(1)
        return is_there[0]

    guards.put_on(param, wait)
    copies = (
        lambda: pickle.loads(pickle.dumps(param._data)),
        lambda: copy.deepcopy(param._data),
        lambda: copy.deepcopy(param)._data,
    )
    for make in copies:
        waited.clear()
        twin = make()
        assert waited and not isinstance(twin, guards._WaitingSlot)
        assert twin[0].tolist() == [0, 1, 2]
    is_there[0] = True
    waited.clear()
    assert param.array is param.array
    assert waited == [1]
    assert type(param._data) is guards._Slot


def test_a_guard_of_before_does_not_take_off_the_next_one() -> None:
    """A thread may come back from its wait when the next update has begun."""
    param = chainer.Parameter(np.zeros(3, np.float32))
    guards.make_guardable([param])
    waited = []

    def first() -> bool:
        guard.take_off()
        guards.put_on(param, second)
        return True

    def second() -> bool:
        waited.append("second")
        return True

    guard = guards.put_on(param, first)
    assert param.array is not None
    assert param.array is not None
    assert waited == ["second"]


def test_copies_of_before_share_a_list_that_cannot_be_guarded() -> None:
    param = chainer.Parameter(0.0, (3,))
    twin = copy.copy(param)
    held = [param.array]
    assert guards.are_held([param], held, ()) == [True]
    del twin
    assert guards.are_held([param], held, ()) == [False]
    known = list(held)
    assert guards.are_held([param], held, known) == [False]
    assert guards.are_held([param], held, ()) == [True]
