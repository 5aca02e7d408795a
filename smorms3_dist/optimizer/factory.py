"""Making a sharded optimizer: from a Chainer optimizer, or from one that ChainerMN has wrapped."""

from __future__ import annotations

from typing import Any

from smorms3_dist.chainer_internals.trainers import call_before_training
from smorms3_dist.collectives.narrowing import check_dtype
from smorms3_dist.optimizer.before_training import prepare
from smorms3_dist.optimizer.optimizer import ShardedOptimizer
from smorms3_dist.optimizer.options import (
    CHECK_FINITE,
    GRADIENT_MODES,
    OVERLAP,
    TRANSPORTS,
    UNEVEN,
)

import chainer

call_before_training(prepare)


def create_multi_node_optimizer(
    actual_optimizer: chainer.GradientMethod,
    communicator: Any,
    double_buffering: bool = False,
    zero_fill: bool = True,
    *,
    gradients: str = "auto",
    step_after_broadcast: bool = False,
    exact: bool = False,
    communication_dtype: str | None = None,
    gather_dtype: str | None = None,
    transport: str = "auto",
    uneven: str = "error",
    check_finite: str = "off",
    accumulate: int = 1,
    overlap: bool | str = False,
    overlap_gather: bool = False,
    share_parameters: bool = False,
) -> ShardedOptimizer:
    """Makes a multi-node optimizer that keeps and updates 1/N of its states on each rank.

    It takes the place of ``chainermn.create_multi_node_optimizer``: the first four arguments are
    that function's.

    Args:
        actual_optimizer: A ``chainer.optimizers.SMORMS3`` or another gradient method, set up or
            not. States that its rules have are taken over at the first update: they must be the
            same on all ranks.
        communicator: A ChainerMN communicator, another object with its interface, or an mpi4py
            communicator.
        double_buffering: Whether each update applies the mean gradients of the update before, while
            its own are reduced beside the next forward and backward pass, as ChainerMN has it over
            NCCL alone. The first update broadcasts, and the second one makes no step either. Takes
            memory for the gradients, and for 1/N of their means. Over transports other than MPI and
            NCCL nothing goes on beside the training.
        zero_fill: Accepted for compatibility. Parameters that were not used on a rank count as zero
            gradients there, whatever it says: Chainer fills them with zeros before the update in
            any case.
        gradients: ``'sharded'`` reduce-scatters gradients, so that a rank sees the mean of its own
            shard only and ``param.grad`` is ``None`` after a step. ``'replicated'`` gives every
            rank the whole mean gradients before hooks run. ``'auto'`` takes ``'sharded'`` unless a
            hook needs whole gradients. Parameters come out the same.
        step_after_broadcast: Whether the first update, and others that broadcast, make a step as
            well, with gradients of parameters from before the broadcast. ChainerMN discards them.
        exact: Whether the kernels on GPUs contract nothing into fused multiply-adds, so that they
            give the results of CPUs bit for bit. On CPUs it is always so.
        communication_dtype: ``'bfloat16'``, ``'float16'`` or ``'float32'`` to round gradients to
            that before they are sent, where it is narrower than their own dtype, on every rank and
            each once. Means are formed in their own dtype on CPUs; over NCCL, in this one. ``None``
            sends them as they are.
        gather_dtype: The same of parameters, on CPUs: all ranks, and all hooks of the optimizer,
            see rounded ones. Owners keep the exact ones, as masters, and update these: nothing is
            lost from step to step. What somebody writes to a parameter counts.
        transport: What carries arrays on GPUs. ``'auto'`` is NCCL where every rank has it, and a
            GPU of its own; else MPI, with a warning that says why. ``'nccl'`` makes that an error.
        uneven: What an update does when another rank makes no more of them: ``'error'`` names it,
            ``'stop'`` ends the training by `smorms3_dist.NoMoreBatches`; see
            `ShardedOptimizer.no_more_batches` and `smorms3_dist.extensions.stop_together`.
        check_finite: What to do about gradients that are infinite or nan, without dynamic loss
            scaling, which leaves such steps out. ``'error'`` names the parameter and the rank that
            has brought it, on all ranks, before anything is updated; ``'warn'`` logs that on rank
            0, once for the same parameters, and goes on. Each rank looks at its own gradients, in
            one pass over them; GPUs are waited for. ``'off'`` does not look.
        accumulate: How many micro-batches make an update: so many calls of ``update``, of which the
            last takes the mean of all gradients. A Trainer's iteration is one update. For blocks of
            a loop of your own there is `ShardedOptimizer.accumulate`.
        overlap: Whether gradients are reduced while the backward pass is still under way, each as
            soon as nothing is added to it any more. That is possible in ``update(lossfun, ...)``,
            which updaters call; on CPUs, where MPI takes calls of several threads, and on GPUs,
            over NCCL. ``'auto'`` does it on CPUs, where ranks are on several hosts and have cores
            to spare; ``True`` wherever it is possible, and says once where it is not. Parameters
            come out the same; 1/N of the gradients' memory is taken more.
        overlap_gather: Whether parameters are gathered beside the next forward pass, each waited
            for where it is first asked for, by whom ever. Where that cannot be, it says so once,
            and they are there before ``update`` returns. Parameters come out the same.
        share_parameters: Whether all ranks of a host share one array of parameters, on CPUs over
            MPI, of which each updates its part: nothing is gathered within a host then, and it
            holds the parameters once. Parameters come out the same; but what somebody writes to
            ``param.array`` between updates is written on all ranks of the host. Where ranks cannot
            map the same memory, rank 0 warns, and each has its own.

    Returns:
        The optimizer, to be used where the actual one would be.

    Raises:
        TypeError: If the optimizer is no gradient method, the communicator is none, or the model
            cannot be updated here.
        ValueError: If ``gradients``, ``check_finite``, ``uneven``, ``transport`` or ``overlap`` is
            none of what it may be, a dtype is not known, ``accumulate`` is no number of
            micro-batches, or ``double_buffering`` is asked for together with ``overlap`` or
            ``overlap_gather``.
        RuntimeError: If a launcher started several processes that MPI does not know of each other.
    """
    _check_mode(gradients)
    if check_finite not in CHECK_FINITE:
        raise ValueError(
            f"check_finite must be one of {', '.join(CHECK_FINITE)}, not {check_finite!r}"
        )
    check_dtype("communication_dtype", communication_dtype)
    check_dtype("gather_dtype", gather_dtype)
    if uneven not in UNEVEN:
        raise ValueError(f"uneven must be one of {', '.join(UNEVEN)}, not {uneven!r}")
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, not {transport!r}")
    if not any(overlap is known for known in OVERLAP):
        raise ValueError(f"overlap must be 'auto', True or False, not {overlap!r}")
    if overlap and double_buffering:
        raise ValueError(
            f"overlap={overlap!r} and double_buffering=True exclude each other: the one reduces "
            "gradients during the backward pass that computes them, the other during the next "
            "forward and backward pass. Leave one of them out"
        )
    if overlap_gather not in (True, False):
        raise ValueError(f"overlap_gather must be True or False, not {overlap_gather!r}")
    if overlap_gather and double_buffering:
        raise ValueError(
            "overlap_gather=True and double_buffering=True exclude each other: both use the time "
            "of the next forward pass, the one for parameters, the other for gradients. Leave one "
            "of them out"
        )
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"accumulate must be 1 or more micro-batches, not {accumulate!r}")
    if _wrapped(actual_optimizer):
        raise TypeError(
            f"{type(actual_optimizer).__name__} is a multi-node optimizer already; pass it to "
            "smorms3_dist.shard(), or pass the Chainer optimizer that it wraps"
        )
    if not isinstance(actual_optimizer, chainer.GradientMethod):
        raise TypeError(
            f"{type(actual_optimizer).__name__} cannot be sharded: it is no "
            "chainer.GradientMethod. Pass a chainer.optimizers.SMORMS3 or another of Chainer's "
            "optimizers"
        )
    return ShardedOptimizer(
        actual_optimizer,
        communicator,
        zero_fill=zero_fill,
        gradients=gradients,
        step_after_broadcast=step_after_broadcast,
        exact=exact,
        communication_dtype=communication_dtype,
        gather_dtype=gather_dtype,
        transport=transport,
        uneven=uneven,
        check_finite=check_finite,
        accumulate=accumulate,
        double_buffering=bool(double_buffering),
        overlap=overlap,
        overlap_gather=bool(overlap_gather),
        share_parameters=bool(share_parameters),
    )


def shard(multi_node_optimizer: Any, *, gradients: str = "auto") -> ShardedOptimizer:
    """Takes over an optimizer that ``chainermn.create_multi_node_optimizer`` made.

    Before or after its ``setup``, and in the middle of a training: hooks, hyperparameters, ``t``,
    ``epoch`` and states stay. All ranks call this between the same two updates, and use the
    returned optimizer from then on. Its first update moves the states into shards and frees
    the whole ones; where the old optimizer has broadcast the parameters already, it makes a step.

    Args:
        multi_node_optimizer: ChainerMN's optimizer. Not to be used any more.
        gradients: As for `create_multi_node_optimizer`.

    Returns:
        The sharded optimizer, around the same Chainer optimizer, over the same communicator.

    Raises:
        TypeError: If it is not a multi-node optimizer of ChainerMN's, or is a double-buffering one
            with gradients under way.
        ValueError: If ``gradients`` is none of the three.
    """
    _check_mode(gradients)
    if isinstance(multi_node_optimizer, ShardedOptimizer):
        raise TypeError("this optimizer is sharded already; use it as it is")
    if isinstance(multi_node_optimizer, chainer.GradientMethod) or not _wrapped(
        multi_node_optimizer
    ):
        raise TypeError(
            f"{type(multi_node_optimizer).__name__} is not a multi-node optimizer of ChainerMN's; "
            "pass what chainermn.create_multi_node_optimizer returned, or use "
            "smorms3_dist.create_multi_node_optimizer for a Chainer optimizer"
        )
    old = vars(multi_node_optimizer)
    actual = old["actual_optimizer"]
    late = "target_params" not in old
    if late and old["needs_update"]:
        raise TypeError(
            f"{type(multi_node_optimizer).__name__} cannot be taken over now: it applies gradients "
            "one update late, and those of its last update are under way. Call shard() before its "
            "second update"
        )
    if late:
        first, _ = old["target_params_list"]
        before = [(name, param.array is not None) for name, param in first]
    else:
        before = old["target_params"]
    now = actual.target is not None and [
        (name, param.array is not None) for name, param in sorted(actual.target.namedparams())
    ]
    return ShardedOptimizer(
        actual,
        old["communicator"],
        zero_fill=old["zero_fill"],
        gradients=gradients,
        synchronized=bool(before) and before == now,
        double_buffering=late,
    )


def _check_mode(gradients: str) -> None:
    if gradients not in GRADIENT_MODES:
        raise ValueError(f"gradients must be one of {', '.join(GRADIENT_MODES)}, not {gradients!r}")


def _wrapped(optimizer: Any) -> bool:
    return {"actual_optimizer", "communicator"} <= getattr(optimizer, "__dict__", {}).keys() or (
        isinstance(optimizer, ShardedOptimizer)
    )
