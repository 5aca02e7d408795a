"""The part of ``pkg_resources`` that Chainer uses, on top of ``importlib.metadata``.

Chainer asks whether requirements such as ``'numpy>=1.10'`` are satisfied, and for the version of a
distribution. Unlike ``pkg_resources``, this does not follow a distribution's own dependencies.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib import metadata


class ResolutionError(Exception):
    """A requirement is not satisfied."""


class DistributionNotFound(ResolutionError):
    """A required distribution is not installed."""


class VersionConflict(ResolutionError):
    """A required distribution is installed in a version that the requirement excludes."""


def get_distribution(name: str) -> metadata.Distribution:
    """Returns the installed distribution, which has a ``version``.

    Raises:
        DistributionNotFound: It is not installed.
    """
    # Not before: launchers import this, and ask for nothing.
    from importlib import metadata

    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise DistributionNotFound(f"The distribution {name!r} is not installed") from error


def require(*requirements: str) -> None:
    """Checks requirements, such as ``'numpy>=1.10'``; one whose marker is false is skipped.

    Raises:
        DistributionNotFound: A required distribution is not installed.
        VersionConflict: A required distribution is installed in another version.
    """
    for text in requirements:
        if ";" not in text:
            # Most that Chainer asks for is not there, which takes no parser to find out.
            get_distribution(re.split(r"[^\w.-]", text.strip(), maxsplit=1)[0])
        from packaging.requirements import Requirement

        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = get_distribution(requirement.name).version
        if not requirement.specifier.contains(version, prereleases=True):
            raise VersionConflict(f"{requirement.name} {version} is installed, not {text!r}")


class WorkingSet:
    """The installed distributions."""

    def require(self, *requirements: str) -> None:
        """As the function `require`."""
        require(*requirements)
