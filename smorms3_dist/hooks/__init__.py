"""Chainer's hooks on shards.

In the order in which a hook meets them: `recognition` says whether it can run on a shard, `views`
and `parts` are what it is called with, `running` calls it, and its test
holds the parts.
"""
