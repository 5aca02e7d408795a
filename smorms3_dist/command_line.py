"""Reads command lines as ``argparse`` does, but says in two lines what is wrong."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn


def meant(word: str, known: Iterable[str]) -> str:
    """What is likely to be meant by an unknown word, as the end of a sentence; or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """A parser with short errors.

    Attributes:
        source: What is read, if that is not the command line; errors name it.
    """

    source = ""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse.ArgumentParser.parse_args`."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return found

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and exits with status 2."""
        text = f"{self.prog}: error: {self.source}{message}"
        self.exit(2, f"{text}\n{self.prog} --help says more\n")

    def options(self) -> dict[str, argparse.Action]:
        """All options by how they are written, those of subcommands among them."""
        found = dict(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    found.update(parser.options())
        return found

    def _unknown(self, words: list[str]) -> str:
        option = next((word for word in words if word.startswith("-")), None)
        if option is None:
            return f"{words[0]!r} is one word too many"
        option = option.partition("=")[0]
        return f"there is no option {option}{meant(option, self.options())}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        close = meant(str(value), known) or f"; there are {', '.join(known)}"
        if action.option_strings:
            raise argparse.ArgumentError(action, f"there is no {value!r}{close}")
        raise argparse.ArgumentError(
            None, f"there is no {str(action.metavar).lower()} {value!r}{close}"
        )
