"""What stands in the place of a Chainer optimizer.

In reading order: `factory` makes it, told by `options`, and for an `unmodified` script in the place
of ChainerMN's; `optimizer` is `ShardedOptimizer`. Below that, `before_step` lets ranks agree on the
step to come, `laid_out` has the model over the ranks (both tested by the optimizer's tests), and
`wrapper` makes it look like the optimizer that it wraps (tested as the drop-in that it is, and by
copying). `accumulation` holds micro-batches back, `overlap` lets gradients be reduced during the
backward pass, `overlap_gather` parameters be gathered beside the next forward pass, `serialization`
writes and reads for Chainer's serializers, `snapshot_log` remembers what was saved and loaded
between two steps. `told` is what ranks must have been told alike, `sync` says in what their values
differ, `finiteness` whose gradients are not finite; `on_device` runs methods on the model's GPU.
For trainers: `of_trainer` finds it in one, `end_of_training` compares ranks when that has come to
its end (both tested by the extensions' tests), `rank_zero` has triggers that fire on all ranks
together, `early_stopping` one that ends the training, `snapshots` has snapshots in which all ranks
take part, `joining_snapshots` lets them take part in those of a script for ChainerMN (tested with
them), and `before_training` is called before a trainer runs.
"""
