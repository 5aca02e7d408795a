"""Chainer's hooks on shards.

In the order in which a hook meets them: `recognition` says whether it can run on a shard, or is an
operation of the update, `views` and `parts` are what it is called with, `norms` are those of whole
parameters, `running` calls it. Its test holds the parts and the norms.
"""
