"""Takes over how pip finds the package index on this machine, whole: settings and files they name.

``python pip_settings.py FILE`` writes all settings of pip, from its files and from variables, into
one FILE, and prints the paths of the files that they name, which have to be at the same places
where the settings are to hold.
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

NAMING_FILES = ("constraint", "build-constraint", "requirement", "cert", "client-cert")
_OF_THIS_MACHINE = ("config-file", "cache-dir")
_KINDS_OF_FILES = ("global", "user", "site", "env")


def _files() -> list[str]:
    """The files that pip reads, in the order in which they count, the last the most.

    Only `pip config debug` tells them by kind: `pip config list` sorts them by their paths.
    """
    command = [sys.executable, "-m", "pip", "config", "debug"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS_OF_FILES}
    kind = ""
    for line in said.splitlines():
        if heading := re.fullmatch(r"(\w+):", line):
            kind = heading[1]
        elif file := re.fullmatch(r"  (/.*), exists: True", line):
            found[kind].append(file[1])
    return [file for kind in _KINDS_OF_FILES for file in found[kind]]


def settings() -> dict[str, str]:
    """The settings that hold when pip installs, by their names without a section."""
    found: dict[str, str] = {}
    parsers = []
    for file in _files():
        parsers.append(configparser.RawConfigParser())
        parsers[-1].read(file)
    # As pip does: a command's own section counts more than the global one, of whichever file.
    for section in ("global", "install"):
        for parser in parsers:
            if parser.has_section(section):
                found.update(parser[section])
    for name, value in os.environ.items():
        if name.startswith("PIP_"):
            found[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    found = {name: " ".join(value.split()) for name, value in found.items()}
    return {name: value for name, value in found.items() if name not in _OF_THIS_MACHINE}


def main(target: Path) -> None:
    found = settings()
    for name in NAMING_FILES:
        words = found.get(name, "").split()
        paths = [word if "://" in word else str(Path(word).resolve()) for word in words]
        if paths:
            found[name] = " ".join(paths)
        for path in paths:
            if Path(path).is_file():
                print(path)
    target.write_text("".join(["[global]\n", *(f"{n} = {v}\n" for n, v in found.items())]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
