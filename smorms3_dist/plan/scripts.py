"""The parameters of a model that a Python file defines."""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from smorms3_dist.layout import ParameterSpec

import numpy as np

_MODULE = "_planned"
"""What the file is to Python meanwhile: no ``__main__``, so that it trains nothing."""


class ScriptError(Exception):
    """A file that cannot be run, or in which there is no model; says which, and what to do."""


class Input(NamedTuple):
    """An argument of a forward pass; its dtype is Chainer's default if ``None``."""

    shape: tuple[int, ...]
    dtype: str | None = None


def specs_of(target: str, inputs: Sequence[Input] = ()) -> tuple[ParameterSpec, ...]:
    """Runs the file of ``FILE.py:MODEL`` and takes the parameters of the model in it.

    MODEL is a link, a class of links or a function that makes one, or a call of these with
    arguments: any expression in the file's names. What it prints goes to standard error. If sizes
    are still unknown, and inputs are given, it is called with zeros, as for training, but without a
    graph.
    """
    match = re.fullmatch(r"(.+\.py):(.+)", target)
    if match is None:
        raise ScriptError(f"{target!r} is not FILE.py:MODEL, such as train.py:Net")
    path, expression = Path(match[1]), match[2].strip()
    if not path.is_file():
        raise ScriptError(f"there is no file {str(path)!r} in {Path.cwd()}")
    with contextlib.redirect_stdout(sys.stderr), _as_script(path) as module:
        return _specs(_made(module, path, expression), target, inputs)


@contextlib.contextmanager
def _as_script(path: Path) -> Iterator[ModuleType]:
    """Runs a file, which finds what is beside it, and no arguments of this program."""
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None and spec.loader is not None, "the name ends with .py"
    module = importlib.util.module_from_spec(spec)
    before = sys.path[:], sys.argv[:]
    sys.path.insert(0, str(path.resolve().parent))
    sys.argv[:] = [str(path)]
    # Where classes of the file look for it.
    sys.modules[_MODULE] = module
    try:
        with _named(path):
            spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[_MODULE]
        sys.path[:], sys.argv[:] = before


def _made(module: ModuleType, path: Path, expression: str) -> Any:
    """What the expression stands for; made, if it is what makes it."""
    import chainer

    try:
        parsed = compile(expression, "<the model>", "eval")
    except SyntaxError as error:
        raise ScriptError(f"{expression!r} after the file's name is not Python") from error
    for name in parsed.co_names[:1]:
        if not hasattr(module, name) and not hasattr(builtins, name):
            raise ScriptError(f"{path} has no {name!r}")
    with _named(path):
        made = eval(parsed, vars(module))
    what = f"{path}:{expression}"
    if callable(made) and not isinstance(made, chainer.Link):
        with contextlib.suppress(ValueError):  # of what is written in C
            try:
                inspect.signature(made).bind()
            except TypeError as error:
                raise ScriptError(
                    f"{what} needs arguments ({error}); give them, as in '{what}(784, 10)'"
                ) from error
        with _named(path):
            made = made()
    if not isinstance(made, chainer.Link):
        raise ScriptError(
            f"{what} is of type {type(made).__name__}; name a chainer.Link, its class or a "
            "function that makes one"
        )
    return made


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says in one line what a file has raised, and in which of its lines."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == path.name]
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        what = (str(error).splitlines() or [""])[0]
        raise ScriptError(f"{where} raised {type(error).__name__}: {what}") from error


def _call(link: Any, target: str, inputs: Sequence[Input]) -> None:
    import chainer

    arrays = [np.zeros(each.shape, each.dtype or chainer.get_dtype()) for each in inputs]
    listed = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
    try:
        # As in training: there may be branches that are used nowhere else.
        with (
            chainer.no_backprop_mode(),
            chainer.using_config("train", True),
            warnings.catch_warnings(),
            np.errstate(all="ignore"),
        ):
            warnings.simplefilter("ignore")
            link(*arrays)
    except Exception as error:
        what = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise ScriptError(
            f"{target}: a forward pass with zeros of {listed} raised {type(error).__name__}: {what}"
        ) from error


def _specs(link: Any, target: str, inputs: Sequence[Input]) -> tuple[ParameterSpec, ...]:
    from smorms3_dist.sharding.model import ModelView, check_parameters

    try:
        check_parameters(link)
    except (TypeError, ValueError) as error:
        raise ScriptError(f"{target}: {error}") from error
    model = ModelView(link)
    if model.uninitialized and inputs:
        _call(link, target, inputs)
        model = ModelView(link)
    if model.uninitialized:
        names = sorted(model.uninitialized)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ScriptError(
            f"{target}: {', '.join(names[:3])}{more} have no shape "
            + (
                "after a forward pass either: it does not come to them"
                if inputs
                else "yet. Give the shape of a batch, as in --input 1,1,28,28, one for each "
                "argument of the model, as in --input 1,784 --input int32:1"
            )
        )
    params = model.initialized.items()
    if not any(param.size for _, param in params):
        raise ScriptError(f"{target}: no parameter has elements")
    return tuple(ParameterSpec(name, param.shape, param.dtype.name) for name, param in params)
