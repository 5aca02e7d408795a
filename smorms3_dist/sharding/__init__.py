"""A model laid out over the ranks.

In reading order: `model` is what the link is now and the layout that all ranks agree on for it,
`rules` says how each parameter is updated. `buffers` holds parameters and gradients of a group,
`states` allocates what its rule remembers of a shard, and `owned_states` fills it. `group` updates
the shard, by the fused update or by a rule's own code (`elementwise`); `whole_group` leaves a rule
to itself. `staged_gradient` keeps the mean gradient of a shard while hooks run on it,
`kept_gradient` until a norm is known. `sharded_model` is all groups of a model; `moving` carries
states into a new layout.
`gradients_in_flight` are those that the next update applies, with double buffering (tested by
tests/optimizer/test_double_buffering.py).

`fingerprints` are what ranks compare, `repairing` gives all what rank 0 has (tested by
tests/optimizer/test_sync.py); `own_gradients` looks for what is not finite (tested by
tests/optimizer/test_finiteness.py).

Staged gradients are tested by tests/step/test_precision.py, test_properties.py and
tests/hooks/test_running.py, a rank's missing memory by tests/device/test_memory.py.
"""
