"""The kernels for GPUs, compiled by NVRTC for each generation: wide accesses, no local memory."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from smorms3_dist.kernels import cuda
from smorms3_dist.kernels.chainer_rules import ADAM, FORMULAS, SMORMS3, Formula

import pytest
from nvrtc import KERNELS, KERNELS_OF_A_RULE, Nvrtc, disassemble

ARCHITECTURES = (75, 80, 86, 89, 90, 100)

BUILDS = [(75, False), (90, False), (90, True), (100, True)]
"""What all kernels are compiled for: it takes 8 s each, and those between differ little."""

STATES = {formula.name: len(formula.states) for formula in FORMULAS}

SIZES = {"Half": 2, "float": 4, "double": 8}


def check(
    nvrtc: Nvrtc, folder: pathlib.Path, kernels: Sequence[str], architecture: int, exact: bool
) -> str:
    """Compiles kernels in one program; returns NVRTC's warnings.

    Fails unless accesses are wide, nothing is spilled, and exact code contracts nothing.
    """
    code, names = cuda.compile_kernels(nvrtc, kernels, architecture, exact)
    assembly, warnings = nvrtc.compiled[code]
    found = disassemble(code, folder / f"{architecture}-{exact}.cubin")
    for kernel, name in zip(kernels, names, strict=True):
        loads, stores = wide_accesses(kernel)
        # Loads from what a table points to are generic.
        assert count(found[name], "LDG.E.128", "LD.E.128") >= loads, kernel
        assert count(found[name], "STG.E.128", "ST.E.128") >= stores, kernel
        assert count(found[name], "LDL", "STL") == 0, kernel
        assert count(found[name], "EXIT") > 0, kernel
    # Machine code does not show it: its divisions are made of such instructions.
    assert ("fma." in assembly) == (not exact)
    assert ".ftz" not in assembly
    return warnings


def count(instructions: Sequence[str], *prefixes: str) -> int:
    return sum(instruction.startswith(prefixes) for instruction in instructions)


def wide_accesses(kernel: str) -> tuple[int, int]:
    """The least number of loads and of stores of 128 bits that a kernel must have."""
    matched = re.fullmatch(r"(\w+)<(.+)>", kernel)
    assert matched is not None
    template, arguments = matched.groups()
    if template == "update":
        rule, _, *types = arguments.split(", ")
        grad, state = (SIZES[argument] for argument in types)
        # The states, and in their dtype the parameters, or their masters.
        states = STATES[rule] + 1 if state >= grad else 0
        return states + (grad >= state), states
    # Packing has a loop for each dtype of a gradient; the last step of a check is of one number.
    return {"pack": (3, 3), "check": (1, 0), "finish_check": (0, 0)}[template]


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    return Nvrtc()


@pytest.fixture(scope="module")
def builds(
    nvrtc: Nvrtc, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[int, bool], Future[str]]]:
    folder = tmp_path_factory.mktemp("builds")
    # Two at once: neither NVRTC nor the disassembler uses more than one core.
    with ThreadPoolExecutor(2) as pool:
        yield {build: pool.submit(check, nvrtc, folder, KERNELS, *build) for build in BUILDS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_accesses_are_wide_and_nothing_is_spilled(
    builds: dict[tuple[int, bool], Future[str]], build: tuple[int, bool]
) -> None:
    assert not builds[build].result(timeout=300)


@pytest.mark.parametrize(("architecture", "exact"), [(90, False), (80, True)])
def test_so_it_is_with_other_rules(
    nvrtc: Nvrtc, tmp_path: pathlib.Path, architecture: int, exact: bool
) -> None:
    others = [formula for formula in FORMULAS if formula != SMORMS3]
    kernels = [f"update<{formula.name}, float, float, float>" for formula in others[exact::2]]
    kernels += [kernel.replace("RULE", ADAM.name) for kernel in KERNELS_OF_A_RULE if not exact]
    check(nvrtc, tmp_path, list(dict.fromkeys(kernels)), architecture, exact)


def test_so_it_is_in_the_kernels_for_float32_on_every_other_generation(
    nvrtc: Nvrtc, tmp_path: pathlib.Path
) -> None:
    for architecture in ARCHITECTURES:
        for exact in {False, True} - {e for number, e in BUILDS if number == architecture}:
            check(nvrtc, tmp_path, ["update<Smorms3, float, float, float>"], architecture, exact)


@pytest.mark.parametrize("formula", [SMORMS3, ADAM])
def test_approximate_code_divides_and_takes_roots_by_the_fast_instructions(
    nvrtc: Nvrtc, formula: Formula
) -> None:
    """Those of which CUDA says that they are off by 2 units in the last place at most."""
    for dtype, fast in (("float", True), ("double", False)):
        kernel = f"update<{formula.name}, {dtype}, {dtype}, {dtype}>"
        code, _ = cuda.compile_kernels(nvrtc, [kernel], 90, False, cuda.APPROXIMATE)
        plain, _ = cuda.compile_kernels(nvrtc, [kernel], 90, False)
        found, usual = (
            set(re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.\S+", nvrtc.compiled[c][0]))
            for c in (code, plain)
        )
        assert {name.split(".")[1] for name in usual} == {"rn"}
        if fast:
            assert {"div.full.f32", "sqrt.approx.f32"} <= found and not found & usual
            assert not any(".ftz" in name for name in found)
        else:
            assert found == usual


def test_gpus_that_nvrtc_does_not_know_yet_get_assembly_for_the_newest_that_it_knows(
    nvrtc: Nvrtc,
) -> None:
    newest = max(nvrtc.getSupportedArchs())
    code, (name,) = cuda.compile_kernels(nvrtc, ["pack<float>"], newest + 30, True)
    assembly = code.decode()
    assert re.search(rf"^\.target sm_{newest}\b", assembly, re.MULTILINE)
    assert f".entry {name}(" in assembly and assembly.endswith("\0")


def test_what_nvrtc_says_is_part_of_the_error(nvrtc: Nvrtc) -> None:
    message = r"(?s)NVRTC \d+\.\d+ cannot compile update<short> of .* for sm_90 \(.*\):\n.*error"
    with pytest.raises(RuntimeError, match=message):
        cuda.compile_kernels(nvrtc, ["update<short>"], 90, True)
    with pytest.raises(RuntimeError, match="for sm_11"):
        cuda.compile_kernels(nvrtc, ["pack<float>"], 11, True)
