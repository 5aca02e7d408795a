"""What a check has found: green, yellow or red, with the remedy."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

GREEN = "green"
YELLOW = "yellow"
RED = "red"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check in one line, and what to do about it; nothing if it is green."""

    status: str
    found: str
    remedy: str = ""


def green(found: str) -> Finding:
    """A finding of something that is as it should be."""
    return Finding(GREEN, found)


def yellow(found: str, remedy: str) -> Finding:
    """A finding of something that could be better, or is not known."""
    return Finding(YELLOW, found, remedy)


def red(found: str, remedy: str) -> Finding:
    """A finding of something that does not work."""
    return Finding(RED, found, remedy)


@dataclasses.dataclass(frozen=True)
class Check:
    """Something to look at, and what the user waits for, if that takes more than a moment."""

    name: str
    look: Callable[[], Finding]
    doing: str = ""


def examine(check: Check) -> Finding:
    """Runs a check. Whatever it raises is a red finding, and the next check can go on."""
    try:
        with warnings.catch_warnings():
            # Of packages that are imported; what matters of it is in the findings.
            warnings.simplefilter("ignore")
            return check.look()
    except (Exception, SystemExit) as error:
        return red(
            f"this check has failed itself: {summary(error)}",
            "see what the error says; nobody foresaw it, so please report it with this line",
        )


def summary(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
