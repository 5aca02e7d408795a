"""Makes the table of patches for compatibility.md of the patches themselves."""

from __future__ import annotations

from smorms3_dist.compat import PATCHES


def table() -> str:
    """The patches as a table in Markdown, a row for each."""
    rows = ["| patch | module | why |", "|---|---|---|"]
    for patch in PATCHES:
        rows.append(f"| `{patch.name}` | `{patch.module}` | {patch.reason} |")
    return "\n".join(rows) + "\n"
