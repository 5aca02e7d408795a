"""One step, which all ranks make together.

In reading order: `agreement` is the word that ranks exchange before it, `way` decides who sees the
gradients, `step` is its order.
"""
