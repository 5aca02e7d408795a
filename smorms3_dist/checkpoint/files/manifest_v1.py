"""Version 1 of manifests: a record for each parameter, and for each range of each of its arrays."""

from __future__ import annotations

import math
from typing import Any

_ALIKE = ("dtype", "update", "states", "master")


def in_groups(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a manifest of version 1 as version 2 has them.

    Raises:
        TypeError: If a field is not of its type.
        LookupError: If one is missing.
        ValueError: If a range does not lie within its parameter.
    """
    groups: dict[str, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    # Of each parameter its group, where it begins there, and its size.
    places: dict[str, tuple[int, int, int]] = {}
    for parameter in fields.pop("parameters"):
        alike = {name: parameter.pop(name) for name in _ALIKE}
        key = repr(alike)
        if key not in groups:
            columns: dict[str, Any] = {"names": [], "shapes": [], "rule_t": []}
            groups[key], sizes[key] = {**alike, **columns, "hyperparameters": {}}, 0
        group, size = groups[key], math.prod(parameter["shape"])
        _add(group, **parameter)
        places[parameter["name"]] = list(groups).index(key), sizes[key], size
        sizes[key] += size
    for file in fields["files"]:
        file["ranges"] = [_range(places, *segment) for segment in file.pop("segments")]
    return {**fields, "groups": list(groups.values())}


def _add(group: dict[str, Any], name: Any, shape: Any, rule_t: Any, hyperparameters: Any) -> None:
    group["names"].append(name)
    group["shapes"].append(shape)
    group["rule_t"].append(rule_t)
    if hyperparameters:
        group["hyperparameters"][name] = hyperparameters


def _range(
    places: dict[str, tuple[int, int, int]],
    tensor: Any,
    kind: Any,
    state: Any,
    parameter: Any,
    start: Any,
    stop: Any,
) -> tuple[Any, ...]:
    number, begin, size = places[parameter]
    if not 0 <= start < stop <= size:
        raise ValueError(f"files has elements {start} to {stop} of the {size} of {parameter}")
    return tensor, number, kind, state, begin + start, begin + stop
