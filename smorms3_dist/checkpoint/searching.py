"""Which steps all ranks can load, newest first, with as few manifests read as need be.

A manifest is read when its step's turn has come: mostly one of them, however many steps there are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from smorms3_dist.checkpoint.files.errors import (
    CheckpointError,
    DamagedCheckpointError,
    NewerVersionError,
)
from smorms3_dist.checkpoint.files.manifest import Manifest
from smorms3_dist.checkpoint.files.steps import Steps
from smorms3_dist.checkpoint.together import together
from smorms3_dist.collectives.base import Collectives

_logger = logging.getLogger(__name__)

SEEN_BY = "seen by rank"


class _Fault(NamedTuple):
    """Why a rank cannot load a step.

    Attributes:
        text: What is damaged; empty if the step is not there.
        is_newer: Whether a newer version of the package has saved it.
    """

    text: str = ""
    is_newer: bool = False


def steps_everywhere(steps: Steps, collectives: Collectives) -> Iterator[tuple[int, Manifest]]:
    """Yields the steps that all ranks see whole, newest first. Collective, step by step.

    Rank 0 logs which newer ones are damaged.

    Raises:
        CheckpointError: If there are steps, and none is whole everywhere; or if a newer version of
            the package has saved a newer one.
    """
    with together(collectives, steps.path, SEEN_BY):
        mine = steps.numbers()
    everybodys = collectives.all_gather_object((steps.host, mine))
    whole: list[list[int]] = [[] for _ in everybodys]
    damaged: dict[int, str] = {}
    found = False
    for number in sorted({n for _, numbers in everybodys for n in numbers}, reverse=True):
        manifest, fault = _look_at(steps, number) if number in mine else (None, _Fault())
        faults = collectives.all_gather_object(fault)
        for rank, theirs in enumerate(faults):
            if theirs is None:
                whole[rank].append(number)
            elif theirs.text and not found:
                damaged[number] = theirs.text
                if theirs.is_newer:
                    _refuse_newer(steps, theirs.text)
        if manifest is not None and not any(faults):
            if not found and collectives.rank == 0:
                for other, text in sorted(damaged.items()):
                    _logger.warning("step %d cannot be used: %s", other, text)
            found = True
            yield number, manifest
    if not found and damaged:
        listed = "; ".join(f"step {n}: {text}" for n, text in sorted(damaged.items()))
        raise DamagedCheckpointError(
            steps.path,
            f"has no whole step. To train from the start, remove the damaged ones: {listed}",
        )
    if not found:
        _refuse_scattered(steps, [host for host, _ in everybodys], whole)


def _look_at(steps: Steps, number: int) -> tuple[Manifest | None, _Fault | None]:
    try:
        return steps.check(number), None
    except CheckpointError as error:
        return None, _Fault(str(error), isinstance(error, NewerVersionError))


def _refuse_newer(steps: Steps, text: str) -> None:
    raise CheckpointError(
        steps.path,
        f"has a newest step that a newer smorms3_dist has saved: {text}. To go on from an older "
        "step instead, move that one away",
    )


def _refuse_scattered(steps: Steps, hosts: Sequence[str], whole: Sequence[list[int]]) -> None:
    """Refuses ranks that see different whole steps, of which none is everywhere."""
    fullest = max(whole, key=len)
    at = whole.index(fullest)
    for rank, (host, theirs) in enumerate(zip(hosts, whole, strict=True)):
        if theirs != fullest:
            raise CheckpointError(
                steps.path,
                f"has {_listed(fullest)} where rank {at} on {hosts[at]} looks, but "
                f"{_listed(theirs)} where rank {rank} on {host} does, and no step everywhere. "
                "Bring the files of all hosts to their places, or use a directory that all hosts "
                "share",
            )


def _listed(steps: Sequence[int]) -> str:
    return f"the steps {', '.join(map(str, sorted(steps)))}" if steps else "none"
