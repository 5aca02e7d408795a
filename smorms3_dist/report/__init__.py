"""What a run does, in numbers, for all ranks together.

In reading order: `numbers` are those of one rank and what stands for all, with their keys; `meter`
reads them; `step_report` is the extension that brings them into a trainer's observation;
`prometheus` and `tensorboard` show them elsewhere.
"""
