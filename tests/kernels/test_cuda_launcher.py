"""What CuPy is asked for by the launcher of kernels, with a stand-in for CuPy."""

from __future__ import annotations

from typing import Any
from unittest import mock

from smorms3_dist.kernels.cuda import CupyLauncher

import fake_cupy
import numpy as np


def test_large_tables_go_to_the_gpu_in_portions_for_which_cuda_waits_for_no_stream(
    cupy: Any,
) -> None:
    launcher = CupyLauncher()
    for rows in (0, 1, 2730, 2731, 9001):
        host = np.arange(3 * rows, dtype=np.int64).reshape(rows, 3)
        there = np.zeros_like(host).view(fake_cupy.DeviceArray)
        written = fake_cupy.DeviceArray.set
        with mock.patch.object(fake_cupy.DeviceArray, "set", autospec=True) as copy:
            copy.side_effect = written
            launcher.overwrite(there, host)
        assert there.tolist() == host.tolist()
        assert all(call.args[1].nbytes <= 64 * 1024 for call in copy.call_args_list)
