"""The stand-in for pkg_resources."""

from __future__ import annotations

from importlib.metadata import version

from smorms3_dist.compat import requirements

import pytest


@pytest.mark.parametrize(
    "satisfied",
    [
        "numpy",
        "numpy>=1.10",
        "numpy>=1.23,<99",
        f"numpy=={version('numpy')}",
        "Typing.Extensions",
        "no-such-distribution; python_version < '3'",
    ],
)
def test_a_satisfied_requirement_passes(satisfied: str) -> None:
    requirements.require(satisfied)
    requirements.WorkingSet().require("numpy", satisfied)


@pytest.mark.parametrize(
    ("requirement", "error", "message"),
    [
        ("numpy<1.10", requirements.VersionConflict, r"numpy .* is installed, not 'numpy<1.10'"),
        ("no-such-distribution", requirements.DistributionNotFound, "'no-such-distribution' is"),
    ],
)
def test_another_raises(requirement: str, error: type[Exception], message: str) -> None:
    assert issubclass(error, requirements.ResolutionError)
    with pytest.raises(error, match=message):
        requirements.require(requirement)
    with pytest.raises(error, match=message):
        requirements.WorkingSet().require("numpy", requirement)


def test_a_distribution_knows_its_version() -> None:
    assert requirements.get_distribution("numpy").version == version("numpy")
