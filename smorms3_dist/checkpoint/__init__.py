"""The sharded checkpoint: saved by all ranks together, and loaded by any number of them.

`extension` is what users call. `saving` and `loading` bring the ranks together: each takes what it
owns of the models (`arrays`) and of its trainer (`rank_state`) to its files, and back. What is on
disk, and how it comes to be there, is in `files`; what the command line does with it, in `tools`.
"""
