"""Updates of contiguous ranges, in place, of all rules of Chainer's, on CPUs and on GPUs.

The update of SMORMS3, per element, after Simon Funk
(http://sifter.org/~simon/journal/20150420.html), in the order in which
`chainer.optimizers.SMORMS3` evaluates it::

    r = 1 / (mem + 1)
    g = (1 - r) * g + r * grad
    g2 = (1 - r) * g2 + r * grad * grad
    x = g * g / (g2 + eps)
    param -= grad * min(x, lr) / (sqrt(g2) + eps)
    mem = 1 + mem * (1 - x)

The other rules stand in `chainer_rules`. Every kernel evaluates each operation in the dtype of the
arrays, rounded once, without contraction into fused multiply-adds and with numpy's rules for nan in
minimum and maximum: results equal those of Chainer bit for bit.

Its modules, in reading order:

- `chainer_rules`: what each rule of Chainer's does to one element, and the constants of a step.
- `mean`: the mean gradient, handed to a kernel before it is evaluated.
- `operations`: what hooks and loss scaling do to a gradient before a rule sees it.
- `segments`: the update of many parameters' segments at once, on CPUs and on GPUs.
- `narrow`: the narrow dtypes in which values are sent.
- `selection`: whether updates on a CPU are compiled (tested in tests/kernels/test_cpu.py).
- `cpu`: the loops over elements, compiled by Numba; `numba_without_scipy` loads it (tested in
  test_numba_cache.py).
- `running_dot`: the dot of an array with itself, of its parts, as BLAS rounds it; `lanes`: its
  sums, compiled; `dots`: whether NumPy's BLAS rounds like that (all tested in test_dots.py).
- `reference`: SMORMS3 in NumPy, which other kernels are compared with (test_cpu.py).
- `tables`: what one launch on a GPU works through: segments, gradients to be packed, a norm
  (tested in test_cuda_source.py, with ``smorms3.cu``).
- `cuda_rules`: the formulas in C++, which ``smorms3.cu`` is compiled with.
- `cuda`: the compilation of both by NVRTC, and the launches through CuPy
  (test_nvrtc.py).
- `cache`: compiled kernels on disk; `numba_cache`: those of Numba, there.
"""
