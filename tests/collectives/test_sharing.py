"""Arrays that the ranks of a host share: one memory, or on all ranks none."""

from __future__ import annotations

import os
from typing import Any

from smorms3_dist.collectives.sharing import CannotShareError, gather, share_on_hosts
from smorms3_dist.device.memory import PARAMETERS, HostMemory, offset_of
from smorms3_dist.device.memory_files import Offer, SharedFile, map_arrays
from smorms3_dist.layout import Bucket

import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks

SIZES = [0, 1, 4097, 3 << 20]


@pytest.mark.parametrize("host_of", [[0], [0, 0, 0], [0, 1, 0, 1, 1]])
def test_what_a_rank_writes_its_host_sees_and_no_other(
    host_of: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadCollectives, "host_of", host_of)
    before = os.listdir("/proc/self/fd")

    def run(collectives: ThreadCollectives) -> None:
        arrays = share_on_hosts(collectives, SIZES)
        assert [array.size for array in arrays] == SIZES
        assert not any(array.any() for array in arrays)
        # As the parameters' own buffers lie.
        places = {array.ctypes.data % HostMemory.page for array in arrays if array.size}
        assert places == {offset_of(PARAMETERS)}
        collectives.meet_on_host()
        if collectives.hosts.is_first:
            for number, array in enumerate(arrays):
                array[...] = 10 * collectives.hosts.number + number + 1
        collectives.meet_on_host()
        for number, array in enumerate(arrays):
            assert (array == 10 * collectives.hosts.number + number + 1).all()
        collectives.meet_on_host()

    run_ranks(len(host_of), run)
    assert sorted(os.listdir("/proc/self/fd")) == sorted(before), "files stay open"


def test_each_part_enters_each_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    host_of = [0, 0, 1, 1, 1]
    monkeypatch.setattr(ThreadCollectives, "host_of", host_of)
    buckets = [Bucket(0, 10, 2), Bucket(10, 25, 3)]

    def run(collectives: ThreadCollectives) -> int:
        (raw,) = share_on_hosts(collectives, [25 * 4])
        flat = raw.view(np.float32)
        for bucket in buckets:
            flat[bucket.part_of(collectives.rank)] = 1 + collectives.rank
        gather(collectives, flat, buckets, shared=True)
        expected = [*np.repeat(range(1, 6), 2), *np.repeat(range(1, 6), 3)]
        np.testing.assert_array_equal(flat, expected)
        return collectives.bytes_sent["all_gather"]

    assert run_ranks(5, run) == [5 * 4] * 5


def _fails(number: int) -> Any:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("broken", "obstacle"),
    [
        (lambda patch: patch.delattr(os, "memfd_create"), "ranks 0-2: this system has no memfd_cr"),
        (lambda patch: patch.setattr(os, "memfd_create", _fails(24)), "ranks 0-2: .*Too many open"),
        (lambda patch: patch.setattr(os, "ftruncate", _fails(27)), "ranks 0-2: .*File too large"),
    ],
)
def test_where_there_are_no_such_files_all_ranks_are_told(
    broken: Any, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    before = os.listdir("/proc/self/fd")

    def run(collectives: ThreadCollectives) -> None:
        with pytest.raises(CannotShareError, match=obstacle):
            share_on_hosts(collectives, [100])

    run_ranks(3, run)
    assert sorted(os.listdir("/proc/self/fd")) == sorted(before)


def test_a_rank_that_cannot_open_the_file_is_named_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(collectives: ThreadCollectives) -> None:
        if collectives.rank == 1:
            # As where containers of one host do not see each other's processes.
            gathered = collectives.all_gather_object

            def other_process(value: object) -> list[object]:
                answers = gathered(value)
                return [
                    SharedFile("/proc/0/fd/3", each.token) if isinstance(each, SharedFile) else each
                    for each in answers
                ]

            monkeypatch.setattr(collectives, "all_gather_object", other_process)
        with pytest.raises(CannotShareError, match=r"^rank 1: .*/proc/0/fd/3"):
            share_on_hosts(collectives, [100])

    run_ranks(3, run)


def test_a_file_of_another_process_is_not_taken_for_it() -> None:
    offers = [Offer([100]), Offer([100])]
    try:
        wrong = SharedFile(offers[0].file.path, offers[1].file.token)
        with pytest.raises(OSError, match="is of another process"):
            map_arrays(wrong, [100])
    finally:
        for offer in offers:
            offer.close()
