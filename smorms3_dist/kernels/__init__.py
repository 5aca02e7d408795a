"""The SMORMS3 update of a contiguous range, in place, one implementation a kind of hardware.

The update, per element, after Simon Funk (http://sifter.org/~simon/journal/20150420.html), in the
order in which `chainer.optimizers.SMORMS3` evaluates it::

    r = 1 / (mem + 1)
    g = (1 - r) * g + r * grad
    g2 = (1 - r) * g2 + r * grad * grad
    x = g * g / (g2 + eps)
    param -= grad * min(x, lr) / (sqrt(g2) + eps)
    mem = 1 + mem * (1 - x)

Every kernel evaluates each operation in the dtype of the arrays, rounded once, without contraction
into fused multiply-adds and with numpy's rules for nan in the minimum: results equal those of
Chainer bit for bit.

Its modules, in reading order:

- `mean`: the mean gradient, handed to a kernel before it is evaluated.
- `segments`: the update of many parameters' segments at once, on CPUs and on GPUs.
- `selection`: which kernel runs on a CPU (tested in tests/kernels/test_cpu.py).
- `reference`: the kernel in NumPy, which all others are compared with (test_cpu.py).
- `cpu`: the kernel compiled by Numba.
- `tables`: what one launch on a GPU works through: segments, gradients to be packed, a norm
  (tested in test_cuda_source.py, with ``smorms3.cu``).
- `cuda`: the compilation of ``smorms3.cu`` by NVRTC, and its launches through CuPy
  (test_nvrtc.py).
- `cache`: compiled kernels on disk; `numba_cache`: those of Numba, there.
"""
