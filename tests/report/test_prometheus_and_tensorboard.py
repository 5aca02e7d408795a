"""Numbers elsewhere: Prometheus asks rank 0 for those of all ranks; TensorBoard's files."""

from __future__ import annotations

import re
import struct
import sys
import urllib.request
from pathlib import Path
from typing import Any

import smorms3_dist
from smorms3_dist.phases import Phase
from smorms3_dist.report.prometheus import Address

import chainer
import models
import numpy as np
import pytest
from chainer import training
from rank_threads import ThreadCollectives, run_ranks
from reported import PAGE, trainer_of


def scraped(said: str) -> dict[str, float]:
    """What a server tells, by name and labels; where it is, it has said."""
    (url,) = re.findall(r"metrics on (http://\S+)", said)
    assert url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(url, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def test_rank_zero_serves_the_numbers_of_all_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    found: list[dict[str, float]] = []

    def run(comm: ThreadCollectives) -> dict[str, Any]:
        trainer = trainer_of(comm, tmp_path)
        trainer.extend(
            smorms3_dist.extensions.StepReport((6, "iteration"), by_rank=True, prometheus=0)
        )

        @training.make_extension(trigger=(6, "iteration"), priority=0)
        def look(trainer: Any) -> None:
            observed.update(trainer.observation)
            if comm.rank == 0:
                found.append(scraped(capsys.readouterr().err))

        observed: dict[str, Any] = {}
        trainer.extend(look)
        trainer.run()
        return observed

    observed = run_ranks(2, run)[0]
    (served,) = found
    for rank in range(2):
        for phase in (phase.key for phase in Phase):
            value = served[f'smorms3_phase_seconds{{phase="{phase}",rank="{rank}"}}']
            assert value == observed[f"smorms3/rank{rank}/{phase}_s"]
        step = served[f'smorms3_step_seconds{{rank="{rank}"}}']
        assert step == observed[f"smorms3/rank{rank}/step_s"]
    assert served["smorms3_imbalance"] == observed["smorms3/imbalance"]
    # The page has each of them, and no other.
    names = set(re.findall(r"^\| `smorms3/\w+` \| `(\w+)", PAGE.read_text(), re.M))
    assert names - {"smorms3_gpu_bytes"} == {name.partition("{")[0] for name in served}


@pytest.mark.parametrize("address", ["9400", "0.0.0.0:9400", "[::1]:9400", 9400])
def test_an_address_is_a_port_or_has_a_host(address: int | str) -> None:
    host = str(address).rpartition(":")[0].strip("[]") or "127.0.0.1"
    assert Address.of(address) == (host, 9400)


@pytest.mark.parametrize("address", ["localhost", "1:2:x", 65536, "", -1])
def test_another_address_is_refused(address: int | str) -> None:
    with pytest.raises(ValueError, match="is neither a port, such as 9400, nor HOST:PORT"):
        Address.of(address)


@pytest.mark.parametrize("missing", [True, False])
def test_what_rank_zero_cannot_serve_is_an_error_on_all_ranks(
    missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        message = r"rank 0: .*pip install 'smorms3-dist\[prometheus\]'"
    else:
        pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
        message = r"rank 0: .*cannot serve metrics on 192\.0\.2\.1:9400"

    def body(optimizer: Any, rank: int) -> None:
        with pytest.raises(RuntimeError, match=message):
            smorms3_dist.StepMeter(optimizer, prometheus="192.0.2.1:9400")

    models.on_ranks(2, body)


def scalars(directory: Path) -> list[tuple[int, str, float]]:
    """The scalars in TensorBoard's files: records with a length and checksums around each."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in directory.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, each.tag, each.simple_value) for each in event.summary.value]
            at += 16 + length
    return found


def test_tensorboard_has_means_of_what_was_observed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")

    def run(comm: ThreadCollectives) -> None:
        trainer = trainer_of(comm, tmp_path)

        @training.make_extension(priority=training.PRIORITY_WRITER)
        def observe(trainer: Any) -> None:
            value = chainer.Variable(np.array(trainer.updater.iteration, "f"))
            chainer.reporter.report({"main/loss": value, "main/other": 1.0})

        trainer.extend(observe)
        trainer.extend(smorms3_dist.extensions.StepReport((3, "iteration")))
        if comm.rank == 0:
            keys = ["main/loss", "smorms3/step_s"]
            report = smorms3_dist.extensions.TensorBoardReport(every=(3, "iteration"), keys=keys)
            trainer.extend(report)
        trainer.run()

    run_ranks(2, run)
    found = scalars(tmp_path / "0" / "tensorboard")
    losses = [(step, value) for step, tag, value in found if tag == "main/loss"]
    assert losses == [(3, 2.0), (6, 5.0)]
    assert [step for step, tag, value in found if tag == "smorms3/step_s" and value > 0] == [3, 6]
    assert len(found) == 4


def test_without_tensorboardx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'smorms3-dist\[tensorboard\]'"):
        smorms3_dist.extensions.TensorBoardReport()
