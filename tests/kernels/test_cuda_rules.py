"""Chainer's rules in the kernels for GPUs, by g++ and on a GPU: the bits of the CPU's loops."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from smorms3_dist.kernels import chainer_rules, cuda_rules
from smorms3_dist.kernels.chainer_rules import FORMULAS, Formula, application_of
from smorms3_dist.kernels.tables import Arrays, Rates, Run, UpdateTable

import kernel_checks as checks
import numpy as np
import pytest
from kernel_checks import Values
from rule_variants import VARIANTS
from test_cuda_source import HOST_AND_GPU, on_gpu, on_host

DTYPES = [
    ("float64", "float64", "float64"),
    ("float32", "float32", "float32"),
    ("float16", "float16", "float32"),
    ("float16", "float32", "float32"),
]
"""Of parameters, gradients and states: in float16 alone no rule but SMORMS3 is computed."""

OTHERS = [name for name in VARIANTS if name != "SMORMS3"]

# Runs of few elements and of more than a chunk, with gaps, where nothing is aligned.
RUNS = [Run(0, 0, 0, 1), Run(1, 2, 2, 3), Run(4, 8, 5, 7), Run(20, 20, 20, 8192 + 1029)]

ALL = Values(mean=1 / 3, clip=0.3, decay=0.01, loss_scale=3.0, skip=0.0)


@pytest.fixture(scope="module", params=HOST_AND_GPU)
def device(request: pytest.FixtureRequest) -> checks.Device:
    """Where nothing is contracted."""
    if request.param == "gpu":
        return on_gpu(exact=True)
    return on_host(request.getfixturevalue("host_launcher"))


def applied(name: str, t: int, dtype: str = "float32") -> tuple[Formula, Rates]:
    """A rule's formula, and its constants in a step, with a weight decay of its own in some."""
    rule = VARIANTS[name]().create_update_rule()
    rule.t = t
    if hasattr(rule, "beta_power"):
        rule.beta_power = rule.hyperparam.beta ** (t + 1)
    told = application_of(type(rule), rule, np.dtype(dtype))
    assert told is not None
    formula, constants = told
    return formula, Rates(constants, decay=0.1 * (t % 2))


@pytest.mark.parametrize("decay", [None, 0.0])
@pytest.mark.parametrize("own_decay", [None, 0.0])
def test_a_decay_by_nothing_carries_what_is_not_finite_into_the_gradient(
    own_decay: float | None, decay: float | None, device: checks.Device
) -> None:
    formula, rates = applied("SGD", 0)
    updated = checks.check_update(
        *(device, DTYPES[1], [Run(0, 0, 0, 999)], [rates._replace(decay=own_decay)]),
        how=Values(decay=decay),
        formula=formula,
        special=True,
    )
    # An infinite parameter stays what it is, unless it gets into its own gradient.
    assert np.isinf(updated["param"][:999]).any() == (decay is None and own_decay is None)


@pytest.mark.parametrize("name", OTHERS)
def test_without_numba_they_are_compared_with_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch, host_launcher: Any
) -> None:
    monkeypatch.setattr(checks, "compiled", None)
    formula, rates = applied(name, 3)
    run = Run(0, 0, 0, 1029)
    checks.check_update(on_host(host_launcher), DTYPES[1], [run], [rates], ALL, formula=formula)


@pytest.mark.parametrize("name", OTHERS)
def test_updates_equal_those_of_a_cpu(device: checks.Device, name: str) -> None:
    formula, _ = applied(name, 1)
    rates = [applied(name, t)[1] for t in (1, 2, 3, 40)]
    assert len(set(rates)) > 1
    for dtypes in DTYPES:
        before = checks.check_update(device, dtypes, RUNS, rates, Values(skip=1.0), formula=formula)
        for how in Values(), ALL:
            after = checks.check_update(device, dtypes, RUNS, rates, how, formula=formula, steps=2)
            assert np.isfinite(after["param"]).mean() > 0.8
            assert (after["param"] != before["param"]).mean() > 0.2
        # All arrays aligned, after a head of three elements.
        names = ("param", "grad", "master", *formula.states)
        starts = dict.fromkeys(names, 5)
        checks.check_update(
            device, dtypes, [Run(0, 0, 0, 1029)], rates[:1], ALL, starts, formula=formula, steps=1
        )


@pytest.mark.parametrize("name", OTHERS)
def test_zeros_subnormals_infinities_and_nans_are_those_of_a_cpu(
    device: checks.Device, name: str
) -> None:
    formula, rates = applied(name, 1)
    for dtypes in DTYPES[:2]:
        values = checks.specials(dtypes[1])
        first, second = (a.reshape(-1) for a in np.meshgrid(values, values, indexing="ij"))
        runs = [Run(0, 0, 0, first.size)]
        for grads in [first], [first, second, first]:
            after = checks.check_update(
                device, dtypes, runs, [rates], grads=grads, steps=len(grads), formula=formula
            )
            assert np.isfinite(after["param"]).any()


def test_every_formula_has_a_struct_of_its_own_name() -> None:
    named = [formula for formula in vars(chainer_rules).values() if isinstance(formula, Formula)]
    assert set(named) == set(FORMULAS) == {applied(name, 1)[0] for name in VARIANTS}
    names = [formula.name for formula in FORMULAS]
    assert len(set(names)) == len(names)
    for name in VARIANTS:
        formula, rates = applied(name, 1)
        assert formula.constant_count == len(rates.constants)
        assert f"struct {formula.name} {{" in cuda_rules.source()


def _with_a_power(d: Any, p: Any, lr: Any) -> Any:
    return p - lr * d**2


def _with_a_number(d: Any, p: Any, lr: Any) -> Any:
    return p - 2 * lr * d


@pytest.mark.parametrize("arithmetic", [_with_a_power, _with_a_number])
def test_what_would_mean_something_else_in_cpp_is_refused(arithmetic: Any) -> None:
    function = ast.parse(inspect.getsource(arithmetic)).body[0]
    assert isinstance(function, ast.FunctionDef)
    with pytest.raises(TypeError, match="a formula cannot have"):
        cuda_rules.struct_of(Formula((), arithmetic))


def test_states_have_to_be_those_of_the_formula(host_launcher: Any) -> None:
    formula, rates = applied("Adam", 1)
    table = UpdateTable(host_launcher, formula, [Run(0, 0, 0, 4)])
    table.set_rates([rates])
    param, grad, m, v = (np.zeros(4, "f") for _ in range(4))
    with pytest.raises(ValueError, match="zip"):
        table.update(Arrays(param, grad, [m]))
    with pytest.raises(ValueError, match="v has dtype float64, not float32"):
        table.update(Arrays(param, grad, [m, v.astype("d")]))
