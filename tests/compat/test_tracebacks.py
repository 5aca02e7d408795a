"""Tracebacks of scripts: as if Python had run them, without what runs and imports for them."""

from __future__ import annotations

import runpy
import traceback
from pathlib import Path

from smorms3_dist.compat import importer, tracebacks

import pytest
from fresh import run


def frames(code: dict[str, str]) -> BaseException:
    """What is raised where each file calls the next one, and the last one raises."""
    names = list(code)
    functions: dict[str, object] = {}
    for name, inner in zip(names, [*names[1:], ""], strict=True):
        source = f"def call():\n    {'functions[inner]()' if inner else code[name]}\n"
        space = {"functions": functions, "inner": inner}
        exec(compile(source, name, "exec"), space)
        functions[name] = space["call"]
    try:
        functions[names[0]]()  # type: ignore[operator]
    except Exception as error:
        assert error.__traceback__ is not None
        error.__traceback__ = error.__traceback__.tb_next
        return error
    raise AssertionError


def files(error: BaseException) -> list[str]:
    kept = tracebacks.without_own_frames(error, "runner.py")
    return [frame.filename for frame in traceback.extract_tb(kept)]


LIB = "<frozen importlib._bootstrap>"


@pytest.mark.parametrize(
    ("path", "raises", "kept"),
    [
        (["runner.py", runpy.__file__, "<frozen runpy>", "a.py", "b.py"], "1/0", ["a.py", "b.py"]),
        # A script may run others by the same means.
        (["runner.py", "a.py", runpy.__file__, "b.py"], "1/0", ["a.py", runpy.__file__, "b.py"]),
        (["runner.py", "a.py", LIB, importer.__file__, LIB, "c.py"], "1/0", ["a.py", "c.py"]),
        (["runner.py", "a.py", LIB, importer.__file__], "raise ImportError", ["a.py"]),
        (["runner.py", "<frozen runpy>"], "raise ImportError", []),
        (["runner.py", "<frozen runpy>"], "raise SyntaxError", []),
        # Not of the script, and so not to be hidden.
        (["runner.py", "<frozen runpy>"], "1/0", ["runner.py", "<frozen runpy>"]),
    ],
)
def test_what_runs_and_imports_is_left_out(path: list[str], raises: str, kept: list[str]) -> None:
    # Lines are told apart by files: the same one twice is one.
    error = frames({f"{name}": raises for name in dict.fromkeys(path)})
    assert files(error) == kept


def test_a_script_that_raises_shows_what_python_shows(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f():\n    raise ValueError('no')\nf()\n")
    (tmp_path / "script.py").write_text("import chainer\nimport broken\n")
    status, output = run(tmp_path, "-m", "smorms3_dist", "script.py")
    assert status == 1
    lines = [line for line in output.splitlines() if not line.strip(" ").startswith(("^", "~"))]
    broken = tmp_path / "broken.py"
    assert lines == [
        "Traceback (most recent call last):",
        '  File "script.py", line 2, in <module>',
        "    import broken",
        f'  File "{broken}", line 3, in <module>',
        "    f()",
        f'  File "{broken}", line 2, in f',
        "    raise ValueError('no')",
        "ValueError: no",
    ]
