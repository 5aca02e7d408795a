"""Takes over how pip finds the package index on this machine, whole: settings and files they name.

``python pip_settings.py FILE`` writes all settings of pip, from its files and from variables, into
one FILE, and prints the paths of the files that they name, which have to be at the same places
where the settings are to hold.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

NAMING_FILES = ("constraint", "build-constraint", "requirement", "cert", "client-cert")
_OF_THIS_MACHINE = ("config-file", "cache-dir")


def settings() -> dict[str, str]:
    """The settings that hold, by their names without a section."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    # Files come in the order in which they count; variables, which count most, last or first.
    for line in sorted(said.splitlines(), key=lambda line: line.startswith(":env:")):
        name, equals, value = line.partition("=")
        if equals:
            found[name.rpartition(".")[2]] = " ".join(ast.literal_eval(value).split())
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
