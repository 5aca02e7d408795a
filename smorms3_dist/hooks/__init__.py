"""Chainer's hooks on shards: which can run there, on what, and how."""
