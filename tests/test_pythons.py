"""All that is said of Pythons says the same: pip's metadata, the docs, the scripts."""

from __future__ import annotations

import re
from pathlib import Path

from smorms3_dist.version import NEWEST_PYTHON, OLDEST_PYTHON, TESTED_PYTHONS

import pytest

ROOT = Path(__file__).parents[1]
WHERE = [
    "README.md",
    "constraints.txt",
    "docs/install.md",
    "tests/compat/matrix.sh",
]


def test_pip_knows_the_oldest_python_and_each_that_is_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    minors = range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 1)
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert classifiers == [f"3.{minor}" for minor in minors]
    assert 'requires-python = ">={}.{}"\n'.format(*OLDEST_PYTHON) in project


@pytest.mark.parametrize("path", WHERE)
def test_texts_name_the_tested_pythons(path: str) -> None:
    text = re.sub(r"\s+(# )?", " ", (ROOT / path).read_text())
    said = re.findall(r"CPython 3\.\d+ to 3\.\d+", text)
    assert set(said) == {TESTED_PYTHONS}, said


def test_the_matrix_knows_a_numpy_for_each_python() -> None:
    matrix = (ROOT / "tests/compat/matrix.sh").read_text()
    for minor in range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 1):
        assert re.search(rf"^    3\.{minor}\) echo ", matrix, re.MULTILINE), minor
        assert re.search(rf"for version in .*\b3\.{minor}\b", matrix), minor
