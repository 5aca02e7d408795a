"""Sphinx builds the pages of this directory by this; see build.sh."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import smorms3_dist  # noqa: E402  (first: it makes Chainer importable)

import patches  # noqa: E402
import rooms  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx.addnodes import pending_xref  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

project = "smorms3_dist"
author = copyright = "the smorms3_dist contributors"
version = release = smorms3_dist.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build.sh"]
myst_heading_anchors = 3
suppress_warnings = ["epub.unknown_project_files"]

# Names in backticks are links where this documentation has them, and plain code elsewhere.
default_role = "py:obj"
# Messages and options are to be found by the letters that they have.
smartquotes = False
add_module_names = False
autodoc_typehints = "none"
# Chainer's own classes, which are described elsewhere.
nitpick_ignore_regex = [("py:class", r"chainer\..*")]
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"smorms3_dist {release}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "monokai"


def _as_code(
    app: Sphinx, env: object, node: pending_xref, content: nodes.TextElement
) -> nodes.TextElement | None:
    """Leaves a name in the backticks of a docstring as it is, if no page has it."""
    return content if node.get("reftype") == "obj" else None


def _put_tables_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts the table of rooms, or of patches, into the page that asks for it."""
    source[0] = source[0].replace("```{rooms}\n```\n", rooms.table())
    source[0] = source[0].replace("```{patches}\n```\n", patches.table())


def setup(app: Sphinx) -> None:
    """Connects the two with Sphinx."""
    app.connect("missing-reference", _as_code)
    app.connect("source-read", _put_tables_in)
