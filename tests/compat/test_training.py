"""The proof of training: the record of this environment against the one of NumPy 1.23.

``reference_numpy_1_23.json`` is what ``training.py --plain`` printed on CPython 3.11.7 with
NumPy 1.23.5 and setuptools 65.5, with which Chainer needs no patch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fresh import run

HERE = Path(__file__).parent
REFERENCE: dict[str, Any] = json.loads((HERE / "reference_numpy_1_23.json").read_text())

# Differences relative to an array's norm, or to the loss. Another BLAS sums in another order: with
# the kernels of five generations of CPUs, the worst that six updates made of it was 1.5e-6 in fp32
# and 3.4e-3 in fp16, whose rounding is 5e-4. An update in another precision, or one update more or
# less, makes more than 1e-3 and 1e-1.
TOLERANCE = {"float32": 1e-5, "mixed16": 2e-2}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = HERE / "scripts" / "training.py"
    status, output = run(tmp_path_factory.mktemp("training"), "-W", "error", script, limit=240)
    assert status == 0, output
    result: dict[str, Any] = json.loads(output)
    return result


def test_the_same_trainings_ran_as_with_numpy_1_23(record: dict[str, Any]) -> None:
    assert REFERENCE["numpy"].startswith("1.23.")
    assert len(REFERENCE["trainings"]) == 10
    assert record["trainings"].keys() == REFERENCE["trainings"].keys()


@pytest.mark.parametrize("name", REFERENCE["trainings"])
def test_no_dtype_differs_and_values_agree_within_rounding(
    name: str, record: dict[str, Any]
) -> None:
    ours, reference = record["trainings"][name], REFERENCE["trainings"][name]
    assert ours["dtypes"] == reference["dtypes"]
    tolerance = TOLERANCE["mixed16" if name.endswith("mixed16") else "float32"]
    assert ours["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert ours["values"].keys() == reference["values"].keys()
    for array, numbers in reference["values"].items():
        norm = numbers[0]
        assert ours["values"][array] == pytest.approx(numbers, rel=0, abs=tolerance * norm), array
    if "trainer" in name:
        assert (ours["resumed_at"], ours["ended_at"]) == (4, 8)
        assert ours["resumed_equals_whole"] is True
