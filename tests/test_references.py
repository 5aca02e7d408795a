"""Counts of those who have an object."""

from __future__ import annotations

from smorms3_dist.references import holders


def test_whoever_has_an_object_is_counted() -> None:
    assert holders([object(), object()]) == [0, 0]
    alone, twice = object(), object()
    holder = {"twice": twice}
    assert holders([alone, holder["twice"], object()]) == [1, 2, 0]
    del twice
    assert holders((holder["twice"],)) == [1]
