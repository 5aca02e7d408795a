"""``python .../run_module.py MODULE ARGUMENTS...``: runs a module of this package.

Unlike ``python -m`` it takes nothing from the current directory, where a ``random.py`` or an older
``smorms3_dist`` may lie; and it takes the package that it belongs to, not another one that is
installed. It imports nothing of it before that is certain.
"""

import os
import runpy
import sys


def python_command(module: str) -> list[str]:
    """The beginning of a command that runs a module of the package with this Python."""
    return [sys.executable, os.path.abspath(__file__), module]


if __name__ == "__main__":
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, os.path.dirname(package))
    else:
        # The folder of this file.
        sys.path[0] = os.path.dirname(package)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
