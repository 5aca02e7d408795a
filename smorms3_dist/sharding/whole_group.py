"""The update of parameters whose rules are left to themselves.

Every rank holds the whole states of such parameters, in the rules, where Chainer keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping

from smorms3_dist.chainer_internals.loss_scale import note_loss_scale
from smorms3_dist.chainer_internals.optimizers import master_of, set_master, set_state
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.sharding.owned_states import Group

import chainer
import numpy as np


class WholeGroup(Group):
    """A group that is updated by its rules' own code, on every rank."""

    @property
    def nbytes(self) -> int:
        """Bytes of the states that this rank holds, fp32 masters included."""
        total = 0
        for _, param in self.parameters():
            rule = param.update_rule
            if isinstance(rule, chainer.UpdateRule):
                arrays = [*(rule.state or {}).values(), master_of(rule)]
                total += sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        return total

    def write_state(self, name: str, index: int, start_p: int, values: np.ndarray) -> None:
        """Overwrites a state of a range of a parameter; see `ShardedGroup.write_state`."""
        param = self.buffers.params[index]
        rule = param.update_rule
        if name == MASTER:
            if master_of(rule) is None:
                set_master(rule, param.array.astype(values.dtype), param.name)
            whole = master_of(rule)
            assert whole is not None
        else:
            states = rule.state or {}
            fresh = self.memory.empty(
                param.size, values.dtype, f"the state {name} of parameter {param.name}"
            ).reshape(param.shape)
            whole = states.setdefault(name, fresh)
            set_state(rule, states)
        whole.reshape(-1)[start_p : start_p + values.size] = values

    def update(self, paths: Mapping[str, int], loss_scale: float | None) -> None:
        """Runs one step of every parameter's rule."""
        for slot, param in self.parameters():
            # A rank on which the parameter was not used has not noted the scale.
            note_loss_scale(param, loss_scale)
            for _ in range(paths[slot.name]):
                param.update()
                note_loss_scale(param, None)
