"""Where options come from: the command line over the environment over a file.

The words of each are put together into one command line, which the parser then reads. So they mean
the same everywhere, and are refused alike.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smorms3_dist.command_line import Parser, meant

PREFIX = "SMORMS3_RUN_"
"""How variables that hold options begin."""

COMMAND_LINE = "command line"
DEFAULT = "default"

_ELSEWHERE_ONLY = ("help", "config", "show_config")
"""What is not asked for in a file."""

_TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class Given(NamedTuple):
    """An option with its value, as words, and where they come from."""

    action: argparse.Action
    words: list[str]
    source: str


def divided(words: list[str], options: Mapping[str, argparse.Action]) -> tuple[list[Given], int]:
    """Divides words into options, up to the first that is none.

    Returns:
        The options that there are, and the number of words that they and unknown ones take.
    """
    found, index = [], 0
    while index < len(words):
        word = words[index]
        if word in ("--", "-m") or not word.startswith("-"):
            break
        name, equals, _ = word.partition("=")
        action, alone = options.get(name), bool(equals)
        if action is None and not word.startswith("--"):
            action, alone = options.get(word[:2]), True
        alone = alone or (action is not None and action.nargs in (0, "?"))
        used = 1 if alone else 2
        if action is not None:
            found.append(Given(action, words[index : index + used], COMMAND_LINE))
        index += used
    return found, min(index, len(words))


def merged(
    parser: Parser, words: list[str], environment: Mapping[str, str]
) -> tuple[argparse.Namespace, dict[str, Given]]:
    """Reads all options, wherever they are given; exits if one is wrong.

    Returns:
        Their values, and of each that was given what has given it.
    """
    options = parser.options()
    own = parser.parse_args(words)
    variables = list(_of_environment(parser, environment))
    path = own.config or next((str(v) for name, v in variables if name == "config"), None)
    levels = [
        _checked(parser, _of_file(parser, Path(path)) if path else ()),
        _checked(parser, ((n, v, PREFIX + _spelt(n)) for n, v in variables if n != "config")),
        divided(words, options)[0],
    ]
    given: dict[str, Given] = {}
    for level in levels:
        for piece in level:
            for dest in _instead_of(parser, piece.action):
                given.pop(dest, None)
        for piece in level:
            before = given.get(piece.action.dest)
            if before is not None and isinstance(piece.action, argparse._AppendAction):
                source = ", ".join(dict.fromkeys([before.source, piece.source]))
                piece = Given(piece.action, [*before.words, *piece.words], source)
            given[piece.action.dest] = piece
    return parser.parse_args([word for piece in given.values() for word in piece.words]), given


def shown(parser: Parser, found: argparse.Namespace, given: Mapping[str, Given]) -> str:
    """The options that hold, as a file that can be given to ``--config``, with their sources."""
    lines = []
    for action in parser._actions:
        value = getattr(found, action.dest, None)
        if action.dest in _ELSEWHERE_ONLY or value is None or value in ([], ()):
            continue
        source = given[action.dest].source if action.dest in given else DEFAULT
        lines.append(f"{_key(action)} = {_toml(action, value)}  # {source}")
    return "\n".join(lines)


def _instead_of(parser: Parser, action: argparse.Action) -> set[str]:
    """What an option takes the place of, where it comes from a higher source."""
    found = set() if isinstance(action, argparse._AppendAction) else {action.dest}
    for group in parser._mutually_exclusive_groups:
        if action in group._group_actions:
            found.update(each.dest for each in group._group_actions)
    return found


def _key(action: argparse.Action) -> str:
    return next(name for name in action.option_strings if name.startswith("--"))[2:]


def _keys(parser: Parser) -> dict[str, argparse.Action]:
    """The options by their long names, without what only a command line has."""
    return {
        name[2:].replace("_", "-"): action
        for name, action in parser.options().items()
        if name.startswith("--") and action.dest not in ("help", "show_config")
    }


def _spelt(key: str) -> str:
    return key.replace("-", "_").upper()


def _of_environment(
    parser: Parser, environment: Mapping[str, str]
) -> Iterable[tuple[str, str | bool | list[str]]]:
    keys = {_spelt(key): key for key in _keys(parser)}
    for variable, text in sorted(environment.items()):
        name = variable.removeprefix(PREFIX)
        if name == variable or not text:
            continue
        if name not in keys:
            close = meant(variable, (PREFIX + each for each in keys))
            parser.error(f"the variable {variable} is for no option{close}")
        action = _keys(parser)[keys[name]]
        if isinstance(action, argparse._AppendAction):
            yield keys[name], shlex.split(text)
        elif action.nargs in (0, "?") and text.lower() in _TRUTHS:
            yield keys[name], _TRUTHS[text.lower()]
        else:
            yield keys[name], text


def _of_file(parser: Parser, path: Path) -> Iterable[tuple[str, Any, str]]:
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        values = tomllib.loads(path.read_text())
    except ModuleNotFoundError:
        parser.error("--config needs Python 3.11, or here: pip install tomli")
    except OSError as error:
        parser.error(f"--config: {path} cannot be read: {error.strerror}")
    except ValueError as error:
        parser.error(f"--config: {path} is not TOML: {error}")
    known = {key: action for key, action in _keys(parser).items() if action.dest != "config"}
    for key, value in values.items():
        if key.replace("_", "-") not in known:
            parser.error(f"{path}: there is no option {key!r}{meant(key, known)}")
        yield key.replace("_", "-"), value, str(path)


def _checked(parser: Parser, entries: Iterable[tuple[str, Any, str]]) -> list[Given]:
    """Makes words of values, and reads them, so that what is wrong is said with its source."""
    found = []
    for key, value, source in entries:
        action = _keys(parser)[key]
        parser.source = f"{source}: "
        words = _words(parser, key, action, value)
        parser.parse_args(words)
        if words:
            found.append(Given(action, words, source))
        parser.source = ""
    return found


def _words(parser: Parser, key: str, action: argparse.Action, value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if any(not isinstance(each, str | int | float) for each in values):
        parser.error(f"{key} is neither a text, a number, true or false, nor a list of them")
    if isinstance(value, bool):
        if action.nargs not in (0, "?"):
            parser.error(f"{key} needs a value, not true or false")
        return [f"--{key}"] if value else []
    if action.nargs == 0:
        parser.error(f"{key} is true or false, not {value!r}")
    if isinstance(action, argparse._AppendAction):
        return [f"--{key}={each}" for each in values]
    if isinstance(value, list):
        texts = [str(each) for each in values]
        value = shlex.join(texts) if action.dest == "mpi_args" else ",".join(texts)
    return [f"--{key}={value}"]


def _toml(action: argparse.Action, value: object) -> str:
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list):
        return json.dumps([str(each) for each in value])
    if isinstance(value, tuple):
        return json.dumps(shlex.join(value) if action.dest == "mpi_args" else ",".join(value))
    if action.nargs == "?" and not value:
        return "true"
    return json.dumps(str(value))
