"""Whether ranks have the same values, and which of them do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.sharding.fingerprints import (
    PARAMETER,
    PERSISTENT_VALUE,
    Fingerprint,
    combined,
)

_SHOWN = 3
"""Names of parameters, or groups of ranks, that a message lists."""


class OutOfSync(NamedTuple):
    """What ranks differ in.

    Attributes:
        names: What has different values, in the order of the names.
        first: Of the first of these, the words for what each rank has, and its ranks.
    """

    names: list[str]
    first: list[tuple[str, list[int]]]

    @property
    def parameters(self) -> frozenset[str]:
        """The parameters among these, without what they are."""
        return self._of(PARAMETER)

    @property
    def persistent_values(self) -> frozenset[str]:
        """The persistent values among these, likewise."""
        return self._of(PERSISTENT_VALUE)

    def _of(self, kind: str) -> frozenset[str]:
        return frozenset(n.removeprefix(kind) for n in self.names if n.startswith(kind))

    def words(self) -> str:
        """Says what differs, on which ranks."""
        name, *others = self.names
        kinds = {what for what, _ in self.first}
        if len(self.first) > _SHOWN and all(len(ranks) == 1 for _, ranks in self.first):
            has = "has another value on every rank"
        elif len(kinds) == 1:
            turns = ("one value", *["another"] * (len(self.first) - 1))
            parts = [f"{t} on {in_words(r)}" for t, (_, r) in zip(turns, self.first, strict=True)]
            has = f"has {listed(parts)}"
        else:
            has = f"is {listed([f'{what} on {in_words(ranks)}' for what, ranks in self.first])}"
        kind = f", {self.first[0][0]}," if len(kinds) == 1 else ""
        more = f". {len(others)} more differ: {listed(others)}" if others else ""
        return f"{name}{kind} {has}{more}"


def remedy(found: OutOfSync, first_update_is_due: bool) -> str:
    """What to do about a difference."""
    told = []
    if found.parameters and first_update_is_due:
        told.append("The first update() gives all ranks the parameters of rank 0: check after it")
    elif found.parameters:
        told.append(
            "Write the same to parameters on all ranks (load_npz, assignments, hooks), or on rank 0"
            " before the first update(), which broadcasts them"
        )
    if found.persistent_values:
        told.append(
            "Statistics of each rank's own data differ unless "
            "chainermn.links.MultiNodeBatchNormalization, or an "
            "AllreducePersistent extension, makes them the same"
        )
    options = "persistent=True, repair=True" if found.persistent_values else "repair=True"
    told.append(
        f"optimizer.check_sync({options}), called on all ranks, gives all of them what rank 0 has"
    )
    return ". ".join(told)


def compare(
    fingerprints: Sequence[Fingerprint], asked: tuple[bool, bool], collectives: Collectives
) -> OutOfSync | None:
    """Compares what the ranks have: one digest of each, and more only if these differ. Collective.

    Args:
        fingerprints: What this rank has.
        asked: Whether persistent values were asked for, and a repair.
        collectives: The ranks.

    Returns:
        The difference, the same on all ranks; ``None`` if there is none.

    Raises:
        RuntimeError: If ranks were not asked for the same.
    """
    everybodys = collectives.all_gather_object((combined(fingerprints), asked))
    for rank, (_, theirs) in enumerate(everybodys):
        if theirs != everybodys[0][1]:
            here, there = (
                "check_sync(persistent={}, repair={})".format(*each)
                for each in (everybodys[0][1], theirs)
            )
            raise RuntimeError(
                f"rank 0 has called {here}, but rank {rank} {there}: give all ranks the same"
            )
    if len({digest for digest, _ in everybodys}) == 1:
        return None
    tables = [
        {name: (what, digest) for name, what, digest in theirs}
        for theirs in collectives.all_gather_object([tuple(each) for each in fingerprints])
    ]
    missing = ("missing", 0)
    names = sorted({name for table in tables for name in table})
    values = {name: [table.get(name, missing) for table in tables] for name in names}
    differing = [name for name, theirs in values.items() if len(set(theirs)) > 1]
    groups: dict[tuple[str, int], list[int]] = {}
    for rank, value in enumerate(values[differing[0]]):
        groups.setdefault(value, []).append(rank)
    first = [(what, ranks) for (what, _), ranks in groups.items()]
    return OutOfSync(differing, first)


def in_words(ranks: Sequence[int]) -> str:
    """Ranks in words, neighbours as a range."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    parts = [str(a) if a == b else f"{a}{'-' if b > a + 1 else ', '}{b}" for a, b in ranges]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


def listed(parts: Sequence[str]) -> str:
    """The first of several, in words."""
    return ", ".join(parts[:_SHOWN]) + (", ..." if len(parts) > _SHOWN else "")
