"""What links and their parameters keep: members by path, arrays, gradients."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import chainer


def arrays_of(params: Iterable[chainer.Parameter]) -> list[Any]:
    """The arrays of parameters."""
    return [param._data[0] for param in params]


def gradients_of(params: Iterable[chainer.Parameter]) -> list[Any]:
    """The gradients of parameters that are NumPy's or CuPy's, each ``None`` if it has none.

    Raises:
        RuntimeError: If one was never set nor cleared.
    """
    return [
        param._grad
        if param._grad_valid and param._grad_var is None and param._layout is None
        else param.grad
        for param in params
    ]


def clear_gradients_of(params: Iterable[chainer.Parameter]) -> None:
    """Leaves parameters that are NumPy's or CuPy's without a gradient."""
    for param in params:
        param._grad = param._grad_var = None
        param._grad_valid = True


def device_of_link(link: chainer.Link) -> chainer.backend.Device:
    """The device of a link's parameters, without bringing all of them into their order."""
    own: Any = link
    name = next(iter(own._params), None) if type(link).params in _PARAMS else None
    param = next(iter(link.params()), None) if name is None else vars(link)[name]
    # While it is serialized `without_parameters` it has none.
    return link.device if param is None else param.device


class NamedParameters:
    """What ``namedparams`` of a link gives, and whether it would give the same again.

    Attributes:
        named: The paths and the parameters.
    """

    def __init__(self, link: chainer.Link) -> None:
        self.named = list(link.namedparams())
        self._link = link
        # What each link in it has: its attributes, and among these the names of its parameters, its
        # children, and all these by name. None if one of them gives parameters in its own way.
        self._parts: list[_Part] | None = []
        if not all(map(self._note, link.links())):
            self._parts = None

    def _note(self, link: chainer.Link) -> bool:
        own = vars(link)
        if type(link).namedparams not in _NAMEDPARAMS or "namedparams" in own:
            return False
        params, children = set(own["_params"]), own.get("_children", ())
        names = [*params, *(children if isinstance(link, chainer.Chain) else ())]
        assert self._parts is not None
        # One of them twice: of a single name there would be no tuple.
        look = operator.itemgetter(names[0], *names) if names else _nothing
        self._parts.append((own, params, copy.copy(children), look, look(own)))
        return True

    def __getstate__(self) -> dict[str, Any]:
        # Copies have attributes of their own.
        return {**self.__dict__, "_parts": None}

    def are_current(self) -> bool:
        """Whether the link's parameters are the same objects, by the same paths."""
        if self._parts is None:
            walked = list(self._link.namedparams())
            return len(walked) == len(self.named) and all(
                path == known and param is before
                for (path, param), (known, before) in zip(walked, self.named, strict=True)
            )
        try:
            return all(
                own["_params"] == params
                and own.get("_children", ()) == children
                and look(own) == members
                for own, params, children, look, members in self._parts
            )
        except (KeyError, TypeError):
            # A member is missing; or it is another, for parameters refuse to be compared.
            return False


def _nothing(_own: object) -> tuple[()]:
    return ()


_Part = tuple[dict[str, Any], set[str], Any, Callable[[Any], tuple[Any, ...]], tuple[Any, ...]]

_PARAMS = {kind.params for kind in (chainer.Link, chainer.Chain, chainer.ChainList)}
_NAMEDPARAMS = {kind.namedparams for kind in (chainer.Link, chainer.Chain, chainer.ChainList)}


@contextlib.contextmanager
def without_parameters(links: Iterable[tuple[chainer.Link, bool]]) -> Iterator[None]:
    """Lets links be serialized without parameters: these are neither written nor asked for.

    Whatever else is serialized meanwhile finds them where they are. A serializer that has a method
    ``pass_over`` is given the path of each link with the names of those that have arrays instead,
    and asked about the others.

    Args:
        links: The links, and whether all parameters of each have arrays.
    """
    distinct = {id(link): (link, whole) for link, whole in links}.values()
    before = [(vars(link), vars(link).get("serialize")) for link, _ in distinct]
    try:
        for link, whole in distinct:
            rest = functools.partial(_serialize_rest, link, whole, link.serialize)
            vars(link)["serialize"] = rest
        yield
    finally:
        for own, serialize in before:
            own["serialize"] = serialize
            if serialize is None:
                del own["serialize"]


_SERIALIZE = {kind.serialize for kind in (chainer.Link, chainer.Chain, chainer.ChainList)}


def _serialize_rest(
    link: chainer.Link, whole: bool, serialize: Callable[[Any], None], serializer: Any
) -> None:
    """Serializes a link without its parameters, as one that has none."""
    everywhere: list[tuple[str, Any]] = list(link.namedlinks())
    pass_over = getattr(serializer, "pass_over", None)
    if pass_over is not None:
        own_ways = (vars(each) for _, each in everywhere if each is not link)
        if not {type(each).serialize for _, each in everywhere} <= _SERIALIZE or any(
            "serialize" in own for own in own_ways
        ):
            # What it writes under which path is its own business.
            serialize(serializer)
            return
    params = {id(each): (each, each._params) for _, each in everywhere}
    try:
        for each, names in params.values():
            own, each._params = vars(each), set()
            if pass_over is not None and not whole:
                each._params = {name for name in names if own[name]._data[0] is None}
        if pass_over is not None:
            for path, each in everywhere:
                pass_over(path.strip("/"), params[id(each)][1] - each._params)
        serialize(serializer)
    finally:
        for each, names in params.values():
            each._params = names


def persistent_values_of(link: chainer.Link) -> Iterator[tuple[str, chainer.Link, str]]:
    """The persistent values of a link and of all in it: path, the link that has it, its name there.

    They come in the order of the links' paths; a link that several paths lead to, once.
    """
    seen = set()
    for path, owner in sorted(link.namedlinks(), key=lambda item: item[0]):
        if id(owner) not in seen:
            seen.add(id(owner))
            for name in sorted(owner._persistent):
                yield f"{path.rstrip('/')}/{name}", owner, name
