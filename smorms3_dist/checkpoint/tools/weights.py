"""The weights of a step for other libraries, in safetensors files or in PyTorch's.

They are what Chainer's ``save_npz`` of the model would have, under the same names: parameters of
all ranks, and what links keep beside them (statistics of batch normalizations) of rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint.files.errors import CheckpointError, naming
from smorms3_dist.checkpoint.files.manifest import MAIN
from smorms3_dist.checkpoint.files.reading import StepReader
from smorms3_dist.checkpoint.files.safetensors import header_of
from smorms3_dist.checkpoint.files.steps import Steps
from smorms3_dist.checkpoint.tools.exporting import Entries
from smorms3_dist.checkpoint.tools.new_files import new_file
from smorms3_dist.checkpoint.tools.npz import Entry
from smorms3_dist.checkpoint.tools.npz_keys import MODEL
from smorms3_dist.checkpoint.tools.progress import Meter, Progress

import numpy as np

FORMATS = {"safetensors": (".safetensors",), "torch": (".pt", ".pth")}
"""The formats, and how the names of their files end."""


def export_weights(
    directory: Steps,
    step: int,
    out: Path,
    form: str,
    *,
    tied: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Writes the weights of a step.

    Args:
        directory: The directory of the step.
        step: The step.
        out: The file, which must not exist.
        form: One of `FORMATS`.
        tied: As for `smorms3_dist.checkpoint.tools.exporting.export`.
        progress: Is told how far it has come.

    Returns:
        The names of what is left out, because it is text.

    Raises:
        CheckpointError: If the step is damaged, the file exists or cannot be written, or a library
            is missing that is wanted for it.
    """
    torch = _torch(out) if form == "torch" else None
    with StepReader(directory, step) as reader:
        path = str(directory.path_of(step))
        found = _weights(Entries(reader, path, tied or {}), path)
        texts = [name for name, entry in found.items() if entry.dtype.kind == "U"]
        weights = {name: entry for name, entry in found.items() if name not in texts}
        meter = Meter(sum(entry.nbytes for entry in weights.values()), progress)
        if torch is None:
            _write_safetensors(out, weights, {"step": str(step)}, meter)
        else:
            _write_torch(torch, out, weights, meter)
    return texts


def _weights(entries: Entries, path: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for key, entry in entries.found.items():
        model = MODEL.fullmatch(key)
        if model is None or entry is None:
            continue
        name = model[2].removeprefix("/") if model[1] == MAIN else f"{model[1]}{model[2]}"
        if name in found:
            raise CheckpointError(path, f"has two weights that are {name} without their optimizers")
        found[name] = entry
    return found


def _write_safetensors(
    out: Path, weights: Mapping[str, Entry], metadata: Mapping[str, str], meter: Meter
) -> None:
    ordered = sorted(weights.items(), key=lambda item: -item[1].dtype.itemsize)
    try:
        header = header_of(((name, e.dtype, e.shape) for name, e in ordered), metadata)
    except ValueError as error:
        raise CheckpointError(out, f"cannot be written: {error}") from error
    with new_file(out) as (file, temporary):
        with naming(temporary, "written"):
            file.write(header)
        for _, entry in ordered:
            # `naming` is for this file: the blocks come from others.
            for block in entry.blocks():
                with naming(temporary, "written"):
                    file.write(block.reshape(-1).view(np.uint8).data)
                meter.add(block.nbytes)


def _write_torch(torch: Any, out: Path, weights: Mapping[str, Entry], meter: Meter) -> None:
    with new_file(out) as (file, temporary):
        tensors = {}
        for name, entry in weights.items():
            array = np.empty(entry.shape, entry.dtype)
            flat, start = array.reshape(-1), 0
            for block in entry.blocks():
                flat[start : start + block.size] = block.reshape(-1)
                start += block.size
                meter.add(block.nbytes)
            tensors[name] = torch.from_numpy(array)
        try:
            with naming(temporary, "written"):
                torch.save(tensors, file)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise CheckpointError(temporary, f"cannot be written: {error}") from error


def _torch(out: Path) -> Any:
    try:
        import torch  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise CheckpointError(
            out,
            f"cannot be written without PyTorch, which cannot be imported: {error}. Install it, by "
            "pip install 'smorms3-dist[torch]', or write --format safetensors, which needs nothing "
            "here and which safetensors.torch.load_file reads",
        ) from error
    return torch
