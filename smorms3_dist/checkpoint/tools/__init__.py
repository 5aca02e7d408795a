"""What the command line does with checkpoints, without ranks and with bounded memory.

In reading order, with the tests of each in ``tests/checkpoint``:

- `commands` reads the arguments and says how it ended (``test_commands``).
- `reports` says what there is, in tables and as JSON (``test_commands``).
- `progress` shows how far long work has come (``test_commands``).
- `exporting` makes a snapshot of Chainer's from a step (``test_export``).
- `weights` writes the weights alone, for other libraries (``test_weights``).
- `npz_keys` knows what the keys of such a snapshot mean (``test_export``).
- `npz` writes npz files as streams (``test_npz``).
- `new_files` names a file when it is whole (``test_npz``).
"""
