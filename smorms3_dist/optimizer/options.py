"""What `create_multi_node_optimizer` may be told, and how a command line says it.

Nothing here imports Chainer: a launcher reads the options, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GRADIENT_MODES = ("auto", "replicated", "sharded")
"""What ``gradients`` may be."""

UNEVEN = ("error", "stop")
"""What ``uneven`` may be."""

CHECK_FINITE = ("off", "warn", "error")
"""What ``check_finite`` may be."""

OVERLAP = ("auto", True, False)
"""What ``overlap`` may be."""

COMMUNICATION_DTYPES = ("float32", "float16", "bfloat16")
"""What ``communication_dtype`` and ``gather_dtype`` may be, besides ``None``."""

TRANSPORTS = ("auto", "nccl")
"""What ``transport`` may be."""


def _words(values: Sequence[str]) -> dict[str, Any]:
    return {value: value for value in values}


_FLAG: dict[str, Any] = {"true": True, "false": False}

OPTIONS: dict[str, Mapping[str, Any] | None] = {
    "double_buffering": _FLAG,
    "gradients": _words(GRADIENT_MODES),
    "step_after_broadcast": _FLAG,
    "exact": _FLAG,
    "communication_dtype": _words(COMMUNICATION_DTYPES),
    "gather_dtype": _words(COMMUNICATION_DTYPES),
    "transport": _words(TRANSPORTS),
    "uneven": _words(UNEVEN),
    "check_finite": _words(CHECK_FINITE),
    "accumulate": None,
    "overlap": {"auto": "auto", **_FLAG},
    "overlap_gather": _FLAG,
    "share_parameters": _FLAG,
}
"""The keyword arguments besides the communicator and ``zero_fill``, and their values by text.

Those with ``None`` are numbers from 1 on.
"""


def read_options(text: str) -> dict[str, Any]:
    """Reads keyword arguments such as ``gradients=replicated,exact=true``; none from ``""``.

    Raises:
        ValueError: If one is not known, has a value that it may not have, or comes twice. The
            message names what there is.
    """
    options: dict[str, Any] = {}
    for entry in text.split(",") if text else ():
        name, _, value = entry.partition("=")
        if name not in OPTIONS:
            raise ValueError(f"{name!r} is none of the options {', '.join(OPTIONS)}")
        if name in options:
            raise ValueError(f"{name} is given twice")
        options[name] = _read_value(name, value)
    return options


def _read_value(name: str, text: str) -> Any:
    values = OPTIONS[name]
    if values is None:
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"{name} must be a number from 1 on, not {text!r}")
        return int(text)
    if text not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, not {text!r}")
    return values[text]
