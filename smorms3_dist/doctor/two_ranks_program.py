"""The program of the two ranks: a sum over them, and training steps beside plain Chainer.

Each rank prints a line for each stage that it has come through. Imports are where they are needed:
what is missing is to stop its own stage, and none before.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

RANKS = 2
STAGES = ("world", "all-reduce", "training")
MARK = "smorms3-dist doctor: "

INTERFACE = "OMPI_MCA_btl_tcp_if_include"
"""What the launcher sets where ranks are on several hosts."""

_STEPS = 3
_SUMMED = 1 << 17
"""Numbers of 8 bytes: more than MPI libraries send at once."""

_SHAPES = {"matrix": (37, 21), "vector": (129,)}


def main() -> int:
    """Runs it; returns the exit status."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    interface = os.environ.get(INTERFACE)
    _report(comm, "world", host=socket.gethostname(), interface=interface)
    if comm.size == RANKS:
        _report(comm, "all-reduce", **_sum(comm))
        _report(comm, "training", **_train(comm))
    return 0


def _report(comm: Any, stage: str, **values: Any) -> None:
    text = json.dumps({"stage": stage, "rank": comm.rank, "size": comm.size, **values})
    # One write: the lines of two ranks must not mix.
    sys.stdout.write(f"{MARK}{text}\n")
    sys.stdout.flush()


def _sum(comm: Any) -> dict[str, Any]:
    from smorms3_dist.collectives.cuda_aware import is_cuda_aware

    import numpy as np

    numbers = np.arange(_SUMMED, dtype=np.float64)
    total = np.empty_like(numbers)
    comm.Allreduce(numbers * (comm.rank + 1), total)
    expected = numbers * sum(rank + 1 for rank in range(RANKS))
    wrong = int(np.count_nonzero(total != expected))
    return {"elements": _SUMMED, "wrong": wrong, "cuda_aware": is_cuda_aware()}


def _train(comm: Any) -> dict[str, Any]:
    """Trains with a shard on each rank, and on all data without; compares the parameters."""
    from smorms3_dist.kernels.selection import compiled_update
    from smorms3_dist.optimizer.factory import create_multi_node_optimizer

    import chainer
    import chainermn
    import numpy as np

    # Ranks begin with different parameters: the first update broadcasts those of rank 0.
    model, plain = _model(comm.rank), _model(0)
    data = [_values(RANKS + rank) for rank in range(RANKS)]
    optimizer = create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(), chainermn.create_communicator("naive", comm)
    ).setup(model)
    optimizer.update(_loss, model, data[comm.rank])
    plain_optimizer = chainer.optimizers.SMORMS3().setup(plain)
    for _ in range(_STEPS):
        optimizer.update(_loss, model, data[comm.rank])
        gradients = [_gradients(plain, rank_data) for rank_data in data]
        for name, parameter in plain.namedparams():
            parameter.grad = (gradients[0][name] + gradients[1][name]) * np.float32(0.5)
        plain_optimizer.update()
    differences = [
        np.abs(parameter.array - other.array)[_bits(parameter) != _bits(other)]
        for parameter, other in zip(model.params(), plain.params(), strict=True)
    ]
    differing = np.concatenate(differences)
    return {
        "steps": _STEPS,
        "elements": sum(parameter.size for parameter in model.params()),
        "differing": differing.size,
        "largest": float(differing.max(initial=0.0)),
        "kernel": "compiled" if compiled_update(np.dtype(np.float32)) else "NumPy",
    }


def _model(seed: int) -> Any:
    import chainer

    model = chainer.Chain()
    with model.init_scope():
        for name, values in _values(seed).items():
            setattr(model, name, chainer.Parameter(values))
    return model


def _values(seed: int) -> dict[str, Any]:
    import numpy as np

    random = np.random.RandomState(seed)
    return {name: random.randn(*shape).astype(np.float32) for name, shape in _SHAPES.items()}


def _loss(model: Any, data: dict[str, Any]) -> Any:
    """Its gradients need no sums of many terms: they do not depend on where arrays lie."""
    import chainer.functions as F

    differences = [getattr(model, name) * values - values for name, values in data.items()]
    return sum(F.sum(difference * difference) for difference in differences)


def _gradients(model: Any, data: dict[str, Any]) -> dict[str, Any]:
    model.cleargrads()
    _loss(model, data).backward()
    return {name: parameter.grad.copy() for name, parameter in model.namedparams()}


def _bits(parameter: Any) -> Any:
    import numpy as np

    return np.ascontiguousarray(parameter.array).view(np.uint32)


if __name__ == "__main__":
    sys.exit(main())
