"""Sharded optimizers for a script that asks ChainerMN for its own: ``--shard``.

``chainermn.create_multi_node_optimizer`` is replaced, under all its names, when the script imports
ChainerMN. Nothing here imports Chainer before the script does, which may want to configure it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from smorms3_dist.compat.importer import Importer
from smorms3_dist.compat.patch import Patch, with_names

if TYPE_CHECKING:
    from smorms3_dist.optimizer.optimizer import ShardedOptimizer

    import chainer

_FACTORY = "chainermn.create_multi_node_optimizer"


class UnmodifiedScript:
    """A script about to run, whose multi-node optimizers are to be sharded.

    Args:
        options: Keyword arguments for `smorms3_dist.create_multi_node_optimizer`.
        rank: The rank of this process, as its launcher has it: rank 0 says what there is to say.
        size: The number of ranks that the launcher has started.
    """

    def __init__(self, options: Mapping[str, Any], rank: int, size: int) -> None:
        self._options = options
        self._rank = rank
        self._size = size
        self._has_sharded = False

    def prepare(self) -> None:
        """Arranges for all that, to be called once before the script runs."""
        replace = with_names(create_multi_node_optimizer=self.create_multi_node_optimizer)
        mends = {"chainermn.optimizers": replace, "chainermn": replace}
        if self._size > 1:
            mends["chainer.optimizer"] = self._look_at_first_update
        Importer.of([_patch(module, mend) for module, mend in mends.items()]).install()

    def create_multi_node_optimizer(
        self,
        actual_optimizer: chainer.GradientMethod,
        communicator: Any,
        double_buffering: bool = False,
        zero_fill: bool = True,
    ) -> ShardedOptimizer:
        """Stands in for ChainerMN's function; see `smorms3_dist.create_multi_node_optimizer`."""
        from smorms3_dist.optimizer.factory import create_multi_node_optimizer

        options = {"double_buffering": double_buffering, **self._options}
        optimizer = create_multi_node_optimizer(
            actual_optimizer, communicator, zero_fill=zero_fill, **options
        )
        if not self._has_sharded:
            self._has_sharded = True
            told = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
            self._say(f"optimizers of {_FACTORY} are sharded{told and f', with {told}'}")
        return optimizer

    def note_end(self) -> None:
        """Says it if there was nothing to shard; to be called when the script has ended well."""
        if not self._has_sharded:
            self._say(f"no effect: the script has made no optimizer by {_FACTORY}")

    def _look_at_first_update(self, module: ModuleType) -> None:
        """Lets Chainer's first update by itself be refused, if it is of a plain Chainer script.

        One that has imported ChainerMN may train something on each rank first, or parts of one
        model on different ranks.
        """
        method = module.GradientMethod
        update = method.update

        @functools.wraps(update)
        def first_update(optimizer: Any, *args: Any, **kwds: Any) -> Any:
            if "chainermn" not in sys.modules:
                raise RuntimeError(
                    f"--shard has nothing to shard: this is rank {self._rank} of {self._size}, and "
                    "the script has not imported chainermn, so that each rank would train a model "
                    "of its own. Make the optimizer by "
                    f"{_FACTORY}(optimizer, chainermn.create_communicator('naive')), or start the "
                    "script on one rank, or without --shard"
                )
            method.update = update
            return update(optimizer, *args, **kwds)

        method.update = first_update

    def _say(self, words: str) -> None:
        if self._rank == 0:
            # In one piece: other ranks write there, too.
            sys.stderr.write(f"smorms3_dist: --shard: {words}\n")
            sys.stderr.flush()


def _patch(module: str, mend: Callable[[ModuleType], None]) -> Patch:
    return Patch(f"shard {module}", module, "--shard was asked for.", lambda: True, mend=mend)
