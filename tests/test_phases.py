"""Phases: at each moment one, none where nothing is recorded, and what each way of a step has."""

from __future__ import annotations

import collections
import itertools
import threading
from typing import Any

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.phases import BESIDE, TRAINING, Phase, Phases, Span

import chainer
import fake_streams
import models
import pytest
from chainer.optimizer_hooks import GradientClipping, GradientNoise, WeightDecay
from ticking import Ticking


def ticking() -> tuple[Phases, Ticking]:
    phases, clock = Phases(), Ticking()
    phases.use_clock(clock)  # type: ignore[arg-type]
    return phases, clock


def test_nothing_is_recorded_or_wrapped_before_somebody_starts() -> None:
    phases, clock = ticking()

    def function() -> None:
        pass

    assert phases.within(Phase.UPDATE, function) is function
    with phases.during(Phase.REDUCE):
        phases.end_step(1)
    assert phases.settle() == [0.0] * len(Phase) and clock.now == 0


def test_a_phase_within_another_is_not_counted_twice() -> None:
    phases, clock = ticking()
    phases.start()
    with phases.during(Phase.REDUCE):
        clock.now += 10
        phases.within(Phase.UPDATE, lambda: setattr(clock, "now", clock.now + 100))()
        with phases.during(Phase.REDUCE):  # the same: nothing changes
            clock.now += 1000
    seconds = phases.settle()
    assert seconds[Phase.UPDATE] == 101
    assert seconds[Phase.REDUCE] == 10 + 1 + 1000 + 1
    assert sum(seconds) == clock.now - 1


def test_an_exception_leaves_the_phase() -> None:
    phases, _ = ticking()
    phases.start()

    def fail() -> None:
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError), phases.during(Phase.GATHER):
            phases.within(Phase.UPDATE, fail)()
        assert phases.switch(Phase.COMPUTE) is Phase.COMPUTE


def test_spans_fill_the_time_and_steps_embrace_them() -> None:
    phases, _ = ticking()
    phases.start()
    phases.spans = spans = collections.deque()
    for number in (1, 2):
        with phases.during(Phase.AGREE):
            with phases.during(Phase.REDUCE):
                pass
            phases.end_step(number)
    # Nobody was told of a phase that took no time.
    names = ["compute", "agree", "reduce", "agree"]
    assert [span.name for span in spans] == [*names, "step 1", *names, "step 2"]
    of_phases = [span for span in spans if not span.name.startswith("step")]
    for one, next_one in itertools.pairwise(of_phases):
        assert one.end == next_one.begin
    first, second = (span for span in spans if span.name.startswith("step"))
    assert first.end == second.begin == 5 and second.end == 9


def test_what_goes_on_beside_is_of_any_thread_and_no_phase() -> None:
    phases, clock = ticking()
    phases.start()
    phases.spans = collections.deque()
    thread = threading.Thread(target=phases.beside("checkpoint write")(lambda: None))
    thread.start()
    thread.join()
    phases.happened("stall", "update 3")
    first, second = phases.spans
    assert (first.name, first.track) == ("checkpoint write", BESIDE)
    assert first.end is not None and first.begin <= first.end
    assert second == Span("stall", TRAINING, second.begin, None, "update 3")
    assert clock.now == 1


def test_a_device_is_counted_when_it_has_come_there(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = Phases()
    phases.use_clock(CudaMemory(0, cupy, None).clock())  # type: ignore[arg-type]
    phases.start()
    phases.spans = spans = collections.deque()
    began = phases._counted_at
    monkeypatch.setattr(fake_streams.Event, "status", 600)  # cudaErrorNotReady
    with phases.during(Phase.UPDATE):
        phases.end_step(1)
    assert not any(phases.seconds) and not spans
    monkeypatch.undo()
    phases.use_clock(CudaMemory(0, cupy, None).clock())  # type: ignore[arg-type]
    assert [span.name for span in spans] == ["compute", "update", "step 1", "compute"]
    assert spans[0].begin == spans[2].begin == began
    assert spans[0].end == spans[1].begin and spans[1].end == spans[2].end == spans[3].begin
    assert sum(phases.seconds) == pytest.approx(spans[3].end - began, abs=1e-6)


def ways() -> dict[str, tuple[Any, dict[str, Any], set[str]]]:
    """Hooks and options, and the phases besides those that every step has."""
    return {
        "streamed": ([], {}, set()),
        "checked": ([GradientClipping(0.1)], {}, {"hooks"}),
        "staged": ([GradientNoise(0.1)], {}, {"hooks"}),
        "replicated": ([WeightDecay(0.1)], {"gradients": "replicated"}, {"hooks"}),
    }


@pytest.mark.parametrize("way", ways())
def test_each_way_of_a_step_has_its_phases(way: str) -> None:
    hooks, options, more = ways()[way]

    def body(optimizer: Any, rank: int) -> dict[str, float]:
        for hook in hooks:
            optimizer.add_hook(hook)
        optimizer.phases.start()
        optimizer.update()
        before = optimizer.phases.settle()
        models.train(optimizer, rank, range(2))
        optimizer.phases.use_clock(Ticking())
        models.train(optimizer, rank, range(2, 3))
        after = optimizer.phases.settle()
        assert optimizer._way.value == way
        return {p.key: after[p] - before[p] for p in Phase if after[p] != before[p]}

    for found in models.on_ranks(2, body, chainer.optimizers.SMORMS3, **options):
        assert found.keys() == {"compute", "agree", "reduce", "update", "gather"} | more


def test_a_streamed_step_reduces_and_updates_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Collectives, "piece_limit", lambda self, dtype: 5000)

    def body(optimizer: Any, rank: int) -> list[str]:
        optimizer.phases.start()
        optimizer.update()
        optimizer.phases.spans = collections.deque()
        models.train(optimizer, rank, range(1))
        return [span.name for span in optimizer.phases.spans]

    for names in models.on_ranks(2, body):
        of_pieces = names[names.index("reduce") : names.index("gather")]
        assert of_pieces == ["reduce", "update"] * (len(of_pieces) // 2)
        # 15 thousand elements are each rank's.
        assert len(of_pieces) >= 2 * 3


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("timing", ["pre", "post"])
def test_hooks_run_in_their_phase(gradients: str, timing: str) -> None:
    def body(optimizer: Any, rank: int) -> set[Phase]:
        seen = set()

        def hook(rule: Any, param: Any) -> None:
            seen.add(optimizer.phases._phase)

        for mark in ("call_for_each_param", "is_elementwise"):
            setattr(hook, mark, True)
        optimizer.add_hook(hook, "mine", timing)
        optimizer.target.g.update_rule.add_hook(hook, "mine", timing)
        optimizer.phases.start()
        optimizer.update()
        models.train(optimizer, rank, range(1))
        assert optimizer.gradient_mode == gradients
        return seen

    assert models.on_ranks(2, body, gradients=gradients) == [{Phase.HOOKS}] * 2
