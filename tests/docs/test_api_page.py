"""docs/api.md: it has an entry for each public name of Chainer's SMORMS3, and for all of ours."""

from __future__ import annotations

import inspect
import re

import smorms3_dist

import chainer
import pages
from rank_threads import run_ranks

PAGE = pages.read("api.md")
SMORMS3 = pages.section(PAGE, "### All of chainer.optimizers.SMORMS3, and what it does here")
ENTRIES = dict(re.findall(r"^- `(\w+)(\(.*\))?`: ", SMORMS3, re.M))


def test_each_public_name_of_smorms3_has_an_entry_and_no_entry_is_of_another_name() -> None:
    public = [name for name in dir(chainer.optimizers.SMORMS3()) if not name.startswith("_")]
    assert list(ENTRIES) == sorted(public)


def signature_of(function: object) -> str:
    signature = inspect.signature(function)
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(inspect.Signature(bare))


def test_each_entry_has_the_signature_that_is_called_here() -> None:
    wrapped = chainer.optimizers.SMORMS3()
    (ours,) = run_ranks(1, lambda c: smorms3_dist.create_multi_node_optimizer(wrapped, c))
    for name, call in ENTRIES.items():
        found = getattr(ours, name)
        assert call == (signature_of(found) if callable(found) else ""), name


def test_each_public_name_of_the_package_is_there() -> None:
    for name in smorms3_dist.__all__:
        assert re.search(rf"^\.\. auto\w+:: smorms3_dist\.{name}\b", PAGE, re.M), name
