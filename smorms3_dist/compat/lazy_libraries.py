"""The patches that import libraries when they are used: over half of what Chainer's import takes.

Few of Chainer's modules want SciPy, h5py, Pillow and filelock, for a function of each: the inverse
error function, a triangular solve, HDF5, reading an image, a lock beside a downloaded file. These
modules get stand-ins, which import the library when something in it is asked for. Where it is not
installed, nothing is changed.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from smorms3_dist.compat.patch import Patch, lent

LIBRARIES = {
    "chainer.dataset.download": "filelock",
    "chainer.datasets.image_dataset": "PIL.Image",
    "chainer.datasets.svhn": "scipy.io",
    "chainer.distributions.multivariate_normal": "scipy.linalg",
    "chainer.functions.math.erfcinv": "scipy.special",
    "chainer.functions.math.erfcx": "scipy.special",
    "chainer.functions.math.erfinv": "scipy.special",
    "chainer.functions.math.ndtri": "scipy.special",
    "chainer.functions.math.sparse_matmul": "scipy.sparse",
    "chainer.links.model.vision.googlenet": "PIL.Image",
    "chainer.links.model.vision.resnet": "PIL.Image",
    "chainer.links.model.vision.vgg": "PIL.Image",
    "chainer.serializers.hdf5": "h5py",
}
"""What the modules import, each for one or two functions only."""


def _stand_in(name: str) -> ModuleType:
    """A module that imports another one when something in it is asked for."""

    def get(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(import_module(name), attribute)

    module = ModuleType(name)
    vars(module)["__getattr__"] = get
    return module


def _stand_ins(name: str) -> AbstractContextManager[object]:
    """Lends the stand-ins for a library, unless it is there already."""
    package, _, part = name.partition(".")
    if package in sys.modules:
        return nullcontext()
    modules = {package: _stand_in(package)}
    if part:
        modules[name] = _stand_in(name)
        vars(modules[package])[part] = modules[name]
    return lent(modules)


def _lazy(module: str, library: str) -> Patch:
    package = library.partition(".")[0]
    return Patch(
        name=f"lazy-{module.rpartition('.')[2].replace('_', '-')}",
        module=module,
        reason=f"It imports {library}, which takes long, for what few scripts use.",
        needed=lambda: PathFinder.find_spec(package) is not None,
        during=lambda: _stand_ins(library),
    )


LAZY_PATCHES = tuple(_lazy(module, library) for module, library in LIBRARIES.items())
