"""The keys of a Chainer snapshot of a trainer, and where in a checkpoint their values are.

A rank's file has the trainer's values under ``trainer/``, those of models saved without a trainer
under ``models/NAME/``, whole update rules under ``rules/NAME/``, and whatever else by its own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from smorms3_dist.checkpoint.files.manifest import MAIN

OWN = "smorms3_dist"
"""Under this name, at the top and in each optimizer, stands what Chainer does not know."""

VERSION = 1
"""Of what stands there in an optimizer; as `smorms3_dist.optimizer.serialization` has it."""

VALUES, ELSEWHERE = "values", "elsewhere"
"""In the metadata of a rank's file: what is no array; and the keys of what is saved elsewhere."""

MODEL = re.compile("updater/model:([^/]+)(/.+)", re.DOTALL)
OPTIMIZER = re.compile("updater/optimizer:([^/]+)(/.+)", re.DOTALL)
_IN_RANK_FILES = re.compile("(models|rules)/([^/]+)(/.+)", re.DOTALL)


def model_key(optimizer: str, path: str) -> str:
    """The key of something in a model.

    Args:
        optimizer: The name of the optimizer.
        path: The path in the link, with a slash in front.
    """
    return f"updater/model:{optimizer}{path}"


def optimizer_key(optimizer: str, path: str) -> str:
    """The key of something in an optimizer; see `model_key`."""
    return f"updater/optimizer:{optimizer}{path}"


def own_key(optimizer: str, path: str) -> str:
    """The key of something in an optimizer that Chainer does not know; see `model_key`."""
    return optimizer_key(optimizer, f"/{OWN}{path}")


def split_name(name: str, optimizers: Iterable[str]) -> tuple[str, str]:
    """The name of the optimizer and the path of a parameter; undoes `full_name`."""
    for optimizer in optimizers:
        if name.startswith(f"{optimizer}:/"):
            return optimizer, name.removeprefix(f"{optimizer}:")
    return MAIN, name


def key_of(name: str) -> str:
    """The key in a snapshot of what has a name in a rank's file."""
    found = _IN_RANK_FILES.fullmatch(name)
    if found is not None:
        return (model_key if found[1] == "models" else optimizer_key)(found[2], found[3])
    return name.removeprefix("trainer/")
