"""The registry: every patch, when it is needed and what it does.

To add one, write its `needed` as a test of the feature that is missing (rather than of a version),
and its `during` or `mend` so that it touches the one module that it names.
"""

from __future__ import annotations

import atexit
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from smorms3_dist.compat import children, forking, requirements
from smorms3_dist.compat.cupy_patches import CUPY_PATCHES
from smorms3_dist.compat.lazy_libraries import LAZY_PATCHES
from smorms3_dist.compat.library_patches import LIBRARY_PATCHES
from smorms3_dist.compat.patch import Patch, View, lent, with_names, with_names_in

# --- tools ------------------------------------------------------------------------------------


def _cannot_import(name: str) -> Callable[[], bool]:
    """Makes a test whether importing a module fails, for whatever reason.

    The module's warnings are left out: were they errors, it would seem to fail.
    """

    def cannot_import() -> bool:
        before = set(sys.modules)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module(name)
        except Exception:
            # The submodules that were imported before it failed are of no use to anyone.
            parent = name.rpartition(".")[0] or name
            for other in set(sys.modules) - before:
                if other.startswith(f"{parent}."):
                    del sys.modules[other]
            return True
        return False

    return cannot_import


def _numpy_refuses(attempt: Callable[[Any], object], error: type[Exception]) -> Callable[[], bool]:
    """Makes a test whether something raises an error in NumPy; some versions do it and warn."""

    def refuses() -> bool:
        import numpy

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                attempt(numpy)
            except error:
                return True
        return False

    return refuses


def _numpy_deprecates(attempt: Callable[[Any], object]) -> Callable[[], bool]:
    """Makes a test whether NumPy warns that something will be refused, or refuses it already."""

    def deprecates() -> bool:
        import numpy

        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            try:
                attempt(numpy)
            except (DeprecationWarning, AttributeError, TypeError):
                return True
        return False

    return deprecates


# --- numpy.distutils --------------------------------------------------------------------------


def _get_info(name: str) -> dict[str, list[str]]:
    """Stands in for ``numpy.distutils.system_info.get_info``.

    Chainer asks on macOS only, to warn about a NumPy that was built on Accelerate.
    """
    import numpy

    if hasattr(numpy.__config__, "get_info"):  # NumPy built by distutils has the answer itself
        info: dict[str, list[str]] = numpy.__config__.get_info(name)
        return info
    config: Any = numpy.show_config(mode="dicts")
    dependencies = config["Build Dependencies"]
    if "accelerate" in dependencies.get("blas", {}).get("name", "").lower():
        return {"extra_link_args": ["-Wl,Accelerate"]}
    return {}


_system_info = ModuleType("numpy.distutils.system_info")
_system_info.get_info = _get_info  # type: ignore[attr-defined]
_distutils = ModuleType("numpy.distutils")
_distutils.system_info = _system_info  # type: ignore[attr-defined]


# --- pkg_resources ----------------------------------------------------------------------------


def _pkg_resources(name: str, module: str) -> Patch:
    return Patch(
        name=name,
        module=module,
        reason="It imports pkg_resources, which setuptools >= 82 does not have.",
        needed=_cannot_import("pkg_resources"),
        during=lambda: lent({"pkg_resources": requirements}),
        mend=with_names(pkg_resources=requirements),
    )


# --- names that NumPy dropped -----------------------------------------------------------------


def _sctypes() -> dict[str, list[type]]:
    import numpy

    return {
        "int": [numpy.int8, numpy.int16, numpy.int32, numpy.int64],
        "float": [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble],
    }


@contextmanager
def _numpy_with_sctypes() -> Iterator[None]:
    import numpy

    numpy.sctypes = _sctypes()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del numpy.sctypes  # type: ignore[attr-defined]


def _mend_as_strided(module: ModuleType) -> None:
    module.np = View("numpy", sctypes=_sctypes())  # type: ignore[attr-defined]


# --- functions of NumPy that behave otherwise -------------------------------------------------


def _meshgrid(*args: Any, **kwargs: Any) -> list[Any]:
    import numpy

    return list(numpy.meshgrid(*args, **kwargs))


_refuses_negative_in_unsigned = _numpy_refuses(
    lambda numpy: numpy.zeros(1, numpy.uint8).__setitem__(0, -1), OverflowError
)


def _wrapped(value: Any, dtype: Any) -> Any:
    """Takes a Python integer modulo the range of an integer dtype, as NumPy did before 2."""
    import numpy

    if type(value) is int and numpy.dtype(dtype).kind in "iu":
        limits = numpy.iinfo(dtype)
        if not limits.min <= value <= limits.max:
            return numpy.array(value).astype(dtype)[()]
    return value


def _mend_pad_sequence(module: ModuleType) -> None:
    original = module.PadSequence.forward

    def forward(self: Any, xs: Any) -> Any:
        self.padding = _wrapped(self.padding, xs[0].dtype)
        return original(self, xs)

    module.PadSequence.forward = forward


def _mend_convert(module: ModuleType) -> None:
    original = module._concat_arrays_with_padding

    def _concat_arrays_with_padding(arrays: Any, padding: Any) -> Any:
        return original(arrays, _wrapped(padding, arrays[0].dtype))

    with_names(_concat_arrays_with_padding=_concat_arrays_with_padding)(module)


def _int(value: Any) -> int:
    """Stands in for ``int``, and takes an array with one element too."""
    return int(value.item() if hasattr(value, "item") else value)


def _maximum(first: Any, second: Any, out: Any) -> Any:
    """Stands in for ``numpy.maximum``, whose result has to be given by name today."""
    import numpy

    return numpy.maximum(first, second, out=out)


def _getattr(value: Any, name: str, default: Any) -> Any:
    """Stands in for ``getattr``; arrays of NumPy have no device."""
    import numpy

    is_device = name == "device" and isinstance(value, numpy.ndarray)
    return default if is_device else getattr(value, name, default)


def _mend_maxout(module: ModuleType) -> None:
    original = module.Maxout.__init__

    class Reshaped(module.initializer.Initializer):  # type: ignore[name-defined]
        """Initializes by a function that wants a view of another shape."""

        def __init__(self, function: Callable[[Any], object], shape: tuple[int, ...]) -> None:
            super().__init__()
            self._function, self._shape = function, shape

        def __call__(self, array: Any) -> None:
            self._function(array.reshape(self._shape))

    def reshaped(value: Any, *shape: int) -> Any:
        """What Chainer calls after it has set an array's shape; other values as they are."""
        is_function = callable(value) and not isinstance(value, module.initializer.Initializer)
        return Reshaped(value, shape) if is_function else value

    @functools.wraps(original)
    def __init__(
        self: Any,
        in_size: int,
        out_size: int,
        pool_size: int,
        initialW: Any = None,
        initial_bias: Any = 0,
    ) -> None:
        initialW = reshaped(initialW, out_size, pool_size, in_size)
        initial_bias = reshaped(initial_bias, out_size, pool_size)
        original(self, in_size, out_size, pool_size, initialW, initial_bias)

    module.Maxout.__init__ = __init__


# --- methods that Python deprecates -----------------------------------------------------------


class _Thread(threading.Thread):
    """A thread that keeps a deprecated method."""

    def setDaemon(self, daemonic: bool) -> None:
        self.daemon = daemonic


class _Threading:
    """``threading`` with such threads."""

    Thread = _Thread

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


def _set_daemon_is_deprecated() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            threading.Thread().setDaemon(True)
        except (AttributeError, DeprecationWarning):
            return True
    return False


def _end_at_exit(module: ModuleType) -> None:
    """Ends the threads of iterators as long as Python lets threads run."""
    loops: weakref.WeakSet[Any] = weakref.WeakSet()
    launch = module._PrefetchLoop.launch_thread

    @functools.wraps(launch)
    def launch_thread(self: Any) -> Any:
        loops.add(self)
        return launch(self)

    @atexit.register
    def end() -> None:
        for loop in list(loops):
            # As the iterator's own finalize does.
            loop._comm.terminate()
            loop.terminate()

    module._PrefetchLoop.launch_thread = launch_thread


# --- children -------------------------------------------------------------------------------


def _forking(name: str, module: str, mend: Callable[[ModuleType], None]) -> Patch:
    return Patch(
        name=name,
        module=module,
        reason="Its workers count on being forked, which Python >= 3.14 no longer does by itself.",
        needed=forking.forks_no_more,
        mend=mend,
    )


# --- the registry -----------------------------------------------------------------------------

_CHAINER_PATCHES = (
    Patch(
        name="numpy-sctypes",
        module="chainer.functions.array.as_strided",
        reason="It uses numpy.sctypes, which NumPy >= 2 does not have.",
        needed=_numpy_refuses(lambda numpy: numpy.sctypes, AttributeError),
        during=_numpy_with_sctypes,
        mend=_mend_as_strided,
    ),
    Patch(
        name="numpy-float",
        module="chainer.functions.array.resize_images",
        reason="It uses numpy.float, which NumPy >= 1.24 does not have.",
        needed=_numpy_refuses(lambda numpy: numpy.float, AttributeError),
        mend=with_names_in("compute_indices_and_weights", numpy=View("numpy", float=float)),
    ),
    Patch(
        name="meshgrid-list",
        module="chainer.distributions.categorical",
        reason="It adds a list to what numpy.meshgrid returns, which is a tuple in NumPy >= 2.",
        needed=_numpy_refuses(lambda numpy: numpy.meshgrid([0]).append, AttributeError),
        mend=with_names(numpy=View("numpy", meshgrid=_meshgrid)),
    ),
    Patch(
        name="pad-sequence-unsigned",
        module="chainer.functions.array.pad_sequence",
        reason="NumPy >= 2 refuses to store a negative padding in an unsigned array.",
        needed=_refuses_negative_in_unsigned,
        mend=_mend_pad_sequence,
    ),
    Patch(
        name="concat-examples-out",
        module="chainer.dataset.convert",
        reason="It gives numpy.maximum its result by position, which NumPy 2.4 deprecates.",
        needed=_numpy_deprecates(lambda numpy: numpy.maximum([0], [0], numpy.zeros(1, int))),
        mend=with_names_in("_concat_arrays_with_padding", numpy=View("numpy", maximum=_maximum)),
    ),
    Patch(
        name="concat-examples-unsigned",
        module="chainer.dataset.convert",
        reason="NumPy >= 2 refuses to store a negative padding in an unsigned array.",
        needed=_refuses_negative_in_unsigned,
        mend=_mend_convert,
    ),
    Patch(
        name="array-device",
        module="chainer.variable",
        reason="Its debug_print() takes arrays with a device for CuPy's, and NumPy >= 2 has such.",
        needed=lambda: not _numpy_refuses(lambda numpy: numpy.ones(1).device, AttributeError)(),
        mend=with_names(getattr=_getattr),
    ),
    Patch(
        name="maxout-shape",
        module="chainer.links.activation.maxout",
        reason="It sets the shape of arrays, which NumPy 2.5 deprecates.",
        needed=_numpy_deprecates(lambda numpy: setattr(numpy.ones(1), "shape", (1, 1))),
        mend=_mend_maxout,
    ),
    Patch(
        name="multi-node-iterator-int",
        module="chainermn.iterators.multi_node_iterator",
        reason="It takes int() of an array with one dimension, which NumPy >= 2.4 refuses.",
        needed=_numpy_refuses(lambda numpy: int(numpy.ones(1)), TypeError),
        mend=with_names(int=_int),
    ),
    Patch(
        name="numpy-distutils",
        module="chainer._environment_check",
        reason="It imports numpy.distutils, which Python >= 3.12 or a new setuptools breaks, and "
        "which takes an eighth of the time of Chainer's import elsewhere.",
        needed=lambda: True,
        during=lambda: lent(
            {"numpy.distutils": _distutils, "numpy.distutils.system_info": _system_info}
        ),
        mend=with_names(numpy=View("numpy", distutils=_distutils)),
    ),
    _pkg_resources("pkg-resources", "chainer._environment_check"),
    _pkg_resources("pkg-resources-testing", "chainer.testing.helper"),
    _pkg_resources("pkg-resources-doctest", "chainer.testing.doctest_helper"),
    Patch(
        name="set-daemon",
        module="chainer.iterators.multiprocess_iterator",
        reason="It calls Thread.setDaemon, which Python >= 3.10 deprecates.",
        needed=_set_daemon_is_deprecated,
        mend=with_names(threading=_Threading()),
    ),
    Patch(
        name="iterator-at-exit",
        module="chainer.iterators.multiprocess_iterator",
        reason="An iterator that is left to the end of the script waits for a thread that Python "
        ">= 3.13 may have stopped by then: for ever, or with an exception.",
        needed=lambda: True,
        mend=_end_at_exit,
    ),
    _forking(
        "forked-iterator",
        "chainer.iterators.multiprocess_iterator",
        with_names(multiprocessing=forking.forking),
    ),
    _forking(
        "forked-writers",
        "chainer.training.extensions.snapshot_writers",
        with_names(multiprocessing=forking.forking),
    ),
    _forking(
        "forked-updater",
        "chainer.training.updaters.multiprocess_parallel_updater",
        forking.mend_parallel_updater,
    ),
    Patch(
        name="start-method",
        module="multiprocessing",
        reason="It does not tell whether a start method is its default or the script's choice.",
        needed=forking.forks_no_more,
        mend=forking.remember_choice,
    ),
    Patch(
        name="communicator-of-child",
        module="chainermn.communicators._communication_utility",
        reason="In a child of a rank it calls MPI, which ends the child or waits for ever.",
        needed=lambda: True,
        mend=children.refuse_communicator,
    ),
    *LIBRARY_PATCHES,
    *LAZY_PATCHES,
    *CUPY_PATCHES,
)


def _any_needed() -> bool:
    return any(patch.is_needed for patch in _CHAINER_PATCHES)


PATCHES = (
    *_CHAINER_PATCHES,
    Patch(
        name="spawned-children",
        module="multiprocessing.spawn",
        reason="A child started by spawn or forkserver has no patches, and takes its rank's MPI.",
        needed=lambda: True,
        mend=children.patch_preparation_data,
    ),
    Patch(
        name="fork-server",
        module="multiprocessing.forkserver",
        reason="A fork server preloads Chainer without the other patches.",
        needed=_any_needed,
        mend=children.patch_preload,
    ),
)
