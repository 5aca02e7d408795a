"""Files that are whole under their names, or as they were."""

from __future__ import annotations

from pathlib import Path

from smorms3_dist.whole_files import replacing

import pytest


def test_a_file_is_replaced_when_its_new_content_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    path.write_text("old")
    with replacing(path) as temporary:
        # Libraries take the format from the ending.
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".svg")
        temporary.write_text("half")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_as_it_was_where_its_new_content_fails(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert list(tmp_path.iterdir()) == [path]
