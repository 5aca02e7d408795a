"""The benchmark of the update on GPUs: all that it launches, on the device that does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fresh import run_code
from test_cupy import CACHE, NULL_DEVICE, needs_cupy

BENCHMARK = f"""{NULL_DEVICE}
import smorms3_dist, cupy, fake_nccl
cupy.cuda.set_allocator(None)
cupy.cuda.nccl.NcclCommunicator = fake_nccl.NcclCommunicator
from benchmarks import gpu_update
gpu_update.main(['--dry-run', '--sizes', '1e3', '1e12', '--output', {{folder!r}}, *{{more!r}}])
for rule in ('7Smorms3', '4Adam', '11MomentumSgd')[:1 if {{more!r}} else 3]:
    assert any(f'updateI{{{{rule}}}}fff' in name for name in null_device.launched), rule
null_device.leave()
"""


@needs_cupy
def test_a_dry_run_launches_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(CACHE))
    code = BENCHMARK.format(folder=str(tmp_path / "results"), more=[])
    status, output = run_code(tmp_path, code, "-W", "ignore")
    assert status == 0, output
    assert "1e+12 elements are left out" in output
    (stored,) = (tmp_path / "results").glob("*.json")
    result = json.loads(stored.read_text())
    assert [row["rule"] for row in result["updates"]] == ["SMORMS3", "Adam", "MomentumSGD"]
    assert {row["gradients"] for row in result["gradients"]} == {"dense", "zero", "sparse"}
    assert {row["ranks"] for row in result["parts"]} == {8, 64}
    assert [row["launch"] for row in result["others"]][-1] == "norm"
    assert all(row["chainer_s"] > 0 and row["ours_s"] > 0 for row in result["many"])
    (page,) = (tmp_path / "results").glob("*.md")
    assert page.read_text().count("\n## ") == 5


@needs_cupy
def test_what_tells_most_is_measured_and_stored_however_short_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(CACHE))
    code = BENCHMARK.format(folder=str(tmp_path / "results"), more=["--seconds", "0"])
    status, output = run_code(tmp_path, code, "-W", "ignore")
    assert status == 0, output
    (stored,) = (tmp_path / "results").glob("*.json")
    (row,) = json.loads(stored.read_text())["updates"]
    assert row["rule"] == "SMORMS3" and {"copy_s", "approximate_s", "chainer_s"} <= row.keys()
    assert "One launch for one range: rule SMORMS3, elements 1e+03, fused, ms nan," in output
    assert "left out after 0 s: 3 of 'A step of many parameters', 9 of 'Gradients of oth" in output
