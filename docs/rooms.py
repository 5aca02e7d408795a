"""Makes the table of rooms for architecture.md of the floors in tests/test_house.py.

That list is what the test of the imports holds the package to, so the table cannot be wrong.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

HOUSE = Path(__file__).parents[1] / "tests" / "test_house.py"


def table() -> str:
    """The rooms as a table in Markdown, a row for each, the highest floor first."""
    rows = ["| floor | room | concern | modules |", "|---|---|---|---|"]
    floors = list(enumerate(_house().FLOORS))
    for number, floor in reversed(floors):
        for room in floor:
            modules = ", ".join(f"`{module}`" for module in room.modules)
            rows.append(f"| {number} | `{room.name}` | {room.concern} | {modules} |")
    return "\n".join(rows) + "\n"


def _house() -> ModuleType:
    specification = importlib.util.spec_from_file_location("test_house", HOUSE)
    assert specification is not None and specification.loader is not None
    house = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(house)
    return house
