"""One step, which all ranks make together.

In reading order: `facts` are what all ranks must have been told alike, `agreement` is the word that
they exchange before it, `way` decides who sees the gradients, `last_use` says when one of them is
final, `early` reduces it from then on, `treatment` is what hooks do to gradients that wait for
norms, `step` is the order of the step, `parameters_in_flight` gathers what it has updated beside
the next forward pass. Facts are tested by test_agreement.py, `early` and `parameters_in_flight` by
tests/optimizer/test_overlap.py and test_overlap_gather.py, `treatment` by
tests/sharding/test_kept_gradient.py.
"""
