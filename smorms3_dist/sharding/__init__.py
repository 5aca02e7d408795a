"""A model laid out over the ranks: flat buffers, the states of each shard, and their update."""
