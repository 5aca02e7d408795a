"""The sharded checkpoint: saved by all ranks together, and loaded by any number of them.

In reading order, with the tests of each in ``tests/checkpoint``:

- `extension` is what users call (``test_saving``, ``test_loading``).
- `saving` takes all ranks through the phases of a save (``test_saving``).
- `keeping` says which steps are kept, and what is done with each that is saved (``test_keeping``).
- `background_work` is what a thread does of it (``test_saving``).
- `loading` reads a step on all ranks, and changes nothing before it is whole (``test_loading``).
- `searching` finds the newest step that all ranks see whole (``test_loading``).
- `together` fails on all ranks where one has failed (``test_together``).
- `arrays` has what a rank owns of the models, to be written and read (``test_loading``).
- `model_state` has what a manifest says of models, and where they differ (``test_loading``).
- `lineage` tells steps of this training from those of another (``test_lineage``).
- `trainer_state` has the rest of a rank: trainer, randomness (``test_saving``, ``test_export``).
- `iterators` says where iterators are, and moves them to another world size (``test_iterators``).
- `unsaved` has what Chainer's extensions do not save of themselves (``test_unsaved``).
- `files` is what is on disk, and how it comes to be there; nothing in it communicates.
- `tools` is what the command line does with it.

All of it with Trainers on real ranks, killed and in trouble, is in ``test_killed_trainings``,
``test_training_faults`` and ``test_hosts``; ``test_v1`` loads a step of the first version.
"""
