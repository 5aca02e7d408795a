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
from smorms3_dist.wording import listed, ranks_in_words

_SHOWN = 3
"""Groups of ranks whose values a message tells apart."""


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
        where = [ranks_in_words(ranks) for _, ranks in self.first]
        if len(self.first) > _SHOWN and all(len(ranks) == 1 for _, ranks in self.first):
            has = "has another value on every rank"
        elif len(kinds) == 1:
            turns = ("one value", *["another"] * (len(where) - 1))
            parts = [f"{turn} on {ranks}" for turn, ranks in zip(turns, where, strict=True)]
            has = f"has {listed(parts)}"
        else:
            parts = [f"{what} on {r}" for (what, _), r in zip(self.first, where, strict=True)]
            has = f"is {listed(parts)}"
        kind = f", {self.first[0][0]}," if len(kinds) == 1 else ""
        more = f". {len(others)} more differ: {listed(others)}" if others else ""
        return f"{name}{kind} {has}{more}"


def refuse(found: OutOfSync, t: int, first_update_is_due: bool) -> None:
    """Raises what there is to be said of a difference.

    Args:
        found: The difference.
        t: The optimizer's ``t``.
        first_update_is_due: Whether the update that broadcasts parameters is still to come.

    Raises:
        RuntimeError: With what differs, on which ranks, and what to do.
    """
    raise RuntimeError(
        f"the ranks are not in sync (t = {t}): {found.words()}. "
        f"{_remedy(found, first_update_is_due)}"
    )


def _remedy(found: OutOfSync, first_update_is_due: bool) -> str:
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


def are_alike(fingerprints: Sequence[Fingerprint], collectives: Collectives) -> bool:
    """Whether all ranks have the same, by one digest of each. Collective."""
    return len(set(collectives.all_gather_object(combined(fingerprints)))) == 1


def compare(fingerprints: Sequence[Fingerprint], collectives: Collectives) -> OutOfSync | None:
    """Finds out which of the ranks' fingerprints differ. Collective.

    Args:
        fingerprints: What this rank has.
        collectives: The ranks.

    Returns:
        The difference, the same on all ranks; ``None`` if there is none.
    """
    tables = [
        {name: (what, digest) for name, what, digest in theirs}
        for theirs in collectives.all_gather_object([tuple(each) for each in fingerprints])
    ]
    missing = ("missing", 0)
    names = sorted({name for table in tables for name in table})
    values = {name: [table.get(name, missing) for table in tables] for name in names}
    differing = [name for name, theirs in values.items() if len(set(theirs)) > 1]
    if not differing:
        return None
    groups: dict[tuple[str, int], list[int]] = {}
    for rank, value in enumerate(values[differing[0]]):
        groups.setdefault(value, []).append(rank)
    first = [(what, ranks) for (what, _), ranks in groups.items()]
    return OutOfSync(differing, first)
