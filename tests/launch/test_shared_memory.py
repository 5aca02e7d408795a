"""The directory in memory that the ranks of a host share."""

from __future__ import annotations

from pathlib import Path

from smorms3_dist.launch.shared_memory import SharedMemory


def test_the_last_rank_or_one_that_was_killed_removes_it(tmp_path: Path) -> None:
    first, second = (SharedMemory(b"secret", tmp_path) for _ in range(2))
    variables = first.variables({})
    assert second.variables({}) == variables
    (directory,) = tmp_path.iterdir()
    assert set(variables.values()) == {str(directory)}
    assert directory.stat().st_mode & 0o777 == 0o700
    file = directory / "sm_segment"
    file.touch()
    first.release(was_killed=False)
    assert file.exists()
    file.unlink()
    second.release(was_killed=False)
    first.release(was_killed=False)
    assert not directory.exists()
    first.variables({})
    file.touch()
    first.release(was_killed=True)
    second.release(was_killed=True)
    assert not directory.exists()


def test_each_attempt_has_its_own_and_a_users_choice_or_no_room_leaves_it_to_mpi(
    tmp_path: Path,
) -> None:
    assert SharedMemory(b"a", tmp_path).directory != SharedMemory(b"b", tmp_path).directory
    chosen = {"OMPI_MCA_btl_sm_backing_directory": "/scratch"}
    assert SharedMemory(b"a", tmp_path).variables(chosen) == {}
    assert SharedMemory(b"a", tmp_path / "missing").variables({}) == {}
    assert list(tmp_path.iterdir()) == []
