"""The stand-in for pkg_resources."""

from __future__ import annotations

from importlib.metadata import version

from smorms3_dist.compat import requirements

import pytest


def test_a_satisfied_requirement_passes() -> None:
    installed = version("numpy")
    several = ("numpy", "numpy>=1.10", "numpy>=1.23,<99", f"numpy=={installed}")
    for satisfied in (*several, "Typing.Extensions", "no-such-distribution; python_version < '3'"):
        requirements.require(satisfied)
        requirements.WorkingSet().require("numpy", satisfied)
    assert requirements.get_distribution("numpy").version == installed


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
