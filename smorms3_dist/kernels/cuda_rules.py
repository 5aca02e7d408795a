"""The formulas of Chainer's rules as C++, made of the text of their arithmetic.

One description serves CPUs, where Numba compiles it, and GPUs. What a formula consists of means the
same in both languages, and is rounded alike: sums, differences, products and quotients, and
calls of a few functions, which ``smorms3.cu`` has under the same names. A
formula becomes a struct with the function ``apply``, which a kernel is instantiated with.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from smorms3_dist.kernels.chainer_rules import FORMULAS, Formula

_OPERATORS: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_FUNCTIONS = {name: name for name in ("smaller", "larger", "unless_nan")} | {"math.sqrt": "root"}
_NUMBERS = {"zero": "0.0", "one": "1.0"}
"""Constants that are always the same; compilers do better where they know them."""


@functools.cache
def source() -> str:
    """The structs of all formulas."""
    return "\n".join(map(struct_of, FORMULAS))


def struct_of(formula: Formula) -> str:
    """The struct of a formula, which has the formula's name."""
    text = textwrap.dedent(inspect.getsource(formula.arithmetic))
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    _, param, *others = (argument.arg for argument in function.args.args)
    states = others[: len(formula.states)]
    constants = others[len(formula.states) :]
    known = {param, *others}
    lines = [f"T {param} = value;"]
    lines += [f"T {name} = states[{index}];" for index, name in enumerate(states)]
    lines += [
        f"const T {name} = {f'T({_NUMBERS[name]})' if name in _NUMBERS else f'constants[{index}]'};"
        for index, name in enumerate(constants)
    ]
    *assignments, result = function.body
    for assignment in assignments:
        assert isinstance(assignment, ast.Assign)
        (target,) = assignment.targets
        assert isinstance(target, ast.Name)
        kind = "" if target.id in known else "T "
        known.add(target.id)
        lines.append(f"{kind}{target.id} = {_expression(assignment.value)};")
    assert isinstance(result, ast.Return)
    values = result.value.elts if isinstance(result.value, ast.Tuple) else [result.value]
    targets = ["value", *(f"states[{index}]" for index in range(len(states)))]
    for target_name, value in zip(targets, values, strict=True):
        assert value is not None
        lines.append(f"{target_name} = {_expression(value)};")
    return f"""struct {formula.name} {{
    static constexpr int STATES = {len(states)}, CONSTANTS = {len(constants)};

    template <class T>
    __device__ static inline void apply(T d, T& value, [[maybe_unused]] T* states,
                                        const T* constants) {{
{textwrap.indent(chr(10).join(lines), " " * 8)}
    }}
}};
"""


def _expression(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return f"({_expression(left)} {_OPERATORS[type(op)]} {_expression(right)})"
        case ast.Call(func=function, args=arguments) if ast.unparse(function) in _FUNCTIONS:
            name = _FUNCTIONS[ast.unparse(function)]
            return f"{name}({', '.join(map(_expression, arguments))})"
    raise TypeError(f"a formula cannot have {ast.unparse(node)!r}: see chainer_rules")
