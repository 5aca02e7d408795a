"""When a gradient is final: as soon as the last function that uses its parameter has run backward.

Chainer gives parameters their gradients when the whole backward pass is over. But a function may
take over the sum of the gradients of its inputs (`chainer.FunctionNode.backward_accumulate`), and
so learn of it: here every function that uses a parameter is given such a method for the time of one
backward pass. Gradients are the same to the bit: the same terms are added in the same order.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import chainer

Final = Callable[[chainer.Parameter, Any], None]
"""``final(param, array)``: takes a parameter's gradient, to which nothing more is added."""


@contextmanager
def watching(
    loss: chainer.Variable, params: Iterable[chainer.Parameter], final: Final
) -> Iterator[None]:
    """Calls ``final`` for each parameter whose gradient becomes final in a backward pass.

    A parameter is passed over whose gradient is ``None``; that the function that is the last one to
    use it takes in several places; or that a function uses which sums gradients up later
    (``lazy_grad_sum``). What functions do within their backward pass besides, as
    `chainer.functions.forget` does, is not foreseen: whether a parameter has the array that was
    final is to be looked at when the pass is over.

    Args:
        loss: The variable whose ``backward()`` is called in the context.
        params: The parameters.
        final: Is called within the backward pass.
    """
    watch = _Watch({param.node: param for param in params}, final)
    watch.begin(loss.creator_node)
    try:
        yield
    finally:
        watch.end()


class _Watch:
    """One backward pass.

    Args:
        params: The parameters by their nodes.
        final: See `watching`.
    """

    def __init__(
        self, params: dict[chainer.variable.VariableNode, chainer.Parameter], final: Final
    ) -> None:
        self._params = params
        self._final = final
        self._users: set[chainer.FunctionNode] = set()
        # Functions that have not run yet, by the nodes of the parameters that they use.
        self._uses: collections.Counter[chainer.variable.VariableNode] = collections.Counter()

    def begin(self, function: chainer.FunctionNode | None) -> None:
        """Walks through all functions that a backward pass can come to."""
        waiting = [] if function is None else [function]
        seen = set(waiting)
        while waiting:
            function = waiting.pop()
            used = set()
            for node in function.inputs:
                creator = node.creator_node
                if creator is None:
                    if node in self._params:
                        used.add(node)
                elif creator not in seen:
                    seen.add(creator)
                    waiting.append(creator)
            if used:
                self._uses.update(used)
                self._watch(function)

    def end(self) -> None:
        """Leaves the functions to which the pass has not come as they were."""
        for function in list(self._users):
            self._leave(function)

    def _watch(self, function: chainer.FunctionNode) -> None:
        def backward_accumulate(
            target_input_indexes: tuple[int, ...], grad_outputs: Any, grad_inputs: Any
        ) -> Any:
            self._leave(function)
            grads = function.backward_accumulate(target_input_indexes, grad_outputs, grad_inputs)
            self._note(function, target_input_indexes, grads)
            return grads

        # A lazy sum is not a sum yet, and its terms have another order.
        if function.lazy_grad_sum:
            self._uses.update(function.inputs)
        elif "backward_accumulate" not in vars(function):
            function.backward_accumulate = backward_accumulate
            self._users.add(function)

    def _leave(self, function: chainer.FunctionNode) -> None:
        if function in self._users:
            self._users.remove(function)
            del function.backward_accumulate

    def _note(
        self, function: chainer.FunctionNode, indexes: tuple[int, ...], grads: tuple[Any, ...]
    ) -> None:
        """Notes that a function has run."""
        found = collections.defaultdict(list)
        for index, grad in zip(indexes, grads, strict=True):
            found[function.inputs[index]].append(grad)
        for node, sums in found.items():
            param = self._params.get(node)
            if param is None:
                continue
            self._uses[node] -= 1
            if not self._uses[node] and len(sums) == 1 and sums[0] is not None:
                self._final(param, sums[0].array)
