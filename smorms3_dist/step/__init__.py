"""One step, which all ranks make together.

In reading order: `facts` are what all ranks must have been told alike, `agreement` is the word that
they exchange before it, `way` decides who sees the gradients, `step` is its order. Facts are tested
by test_agreement.py.
"""
