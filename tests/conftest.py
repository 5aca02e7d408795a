"""Chainer's patches come before Chainer; threads of BLAS come one a rank."""

from __future__ import annotations

import os

# Read when NumPy is loaded: many small matrices on few cores, in several processes at once.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import smorms3_dist  # noqa: E402, F401
