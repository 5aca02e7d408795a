"""Trainings on hosts that share a directory, have one each, or neither."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import trainings

HOSTS = ["a", "a", "b"]


def job(path: Path, hosts: list[str] = HOSTS, **options: Any) -> dict[str, Any]:
    """A training whose hosts have a directory each."""
    return {"directories": [str(path / host) for host in hosts], "hosts": hosts, **options}


def steps(path: Path) -> list[list[int]]:
    return [trainings.whole_steps(path / host, host) for host in ("a", "b")]


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_hosts_may_have_a_directory_each(tmp_path: Path) -> None:
    path, out = tmp_path / "d", tmp_path / "out"
    trainings.fork(3, out, job(path, until=6))
    assert steps(path) == [[4, 6], [4, 6]]
    ours, theirs = (path / host / "step-0000000006" for host in ("a", "b"))
    assert names(ours) == ["manifest.json"] + [
        f"{kind}-{rank:05d}.safetensors" for kind in ("rank", "shard") for rank in (0, 1)
    ]
    assert names(theirs) == ["manifest.json", "rank-00002.safetensors", "shard-00002.safetensors"]
    assert (ours / "manifest.json").read_bytes() == (theirs / "manifest.json").read_bytes()

    one, none, other, fewer = (tmp_path / name for name in ("one", "none", "other", "fewer"))
    for copy in (one, none, other, fewer):
        shutil.copytree(path, copy)
    # As where one host has committed it, and the other has died.
    shutil.rmtree(one / "b" / "step-0000000006")
    shutil.rmtree(none / "b")
    shutil.rmtree(other / "a" / "step-0000000004")
    shutil.rmtree(other / "b" / "step-0000000006")
    outcome = trainings.fork(
        3,
        out,
        {"name": "never"},
        job(path, name="again"),
        job(one, name="one"),
        job(none, name="none", error=True),
        job(other, name="other", error=True),
    )
    for name, step in (("again", 6), ("one", 4)):
        assert [values["step"] for values in outcome.reports("start", name)] == [step] * 3
        assert outcome.facts(name) == outcome.facts("never")
        assert steps(tmp_path / {"again": "d"}.get(name, name)) == [[8, 10], [8, 10]]
    for name, theirs_and_ours in (
        ("none", "the steps 4, 6 where rank 0 on a looks, but none where rank 2 on b does"),
        ("other", "the steps 6 where rank 0 on a looks, but the steps 4 where rank 2 on b does"),
    ):
        errors = [values["error"] for values in outcome.reports("error", name)]
        assert len(errors) == 3
        for error in errors:
            assert theirs_and_ours in error
            assert "Bring the files of all hosts to their places" in error

    resized = trainings.fork(2, out, job(fewer, ["a", "b"], error=True))
    for values in resized.reports("error"):
        words = r"/(shard|rank)-0000\d.safetensors: is missing here, on host (a|b): each host has"
        assert re.search(words + r" its own files, and this one is of rank \d on host", str(values))


def test_hosts_that_neither_share_nor_have_their_own_are_refused(tmp_path: Path) -> None:
    def where(*directories: str) -> list[str]:
        return [str(tmp_path / directory) for directory in directories]

    settings = {
        "two of three": {"directories": where("x", "x", "y"), "hosts": ["a", "b", "c"]},
        "two on a host": {"directories": where("x", "y", "z"), "hosts": ["a", "a", "b"]},
        "two of one name": {"directories": where("x", "y", "y"), "hosts": ["a", "a", "a"]},
        "two on another host": {"directories": where("x", "y", "z"), "hosts": ["a", "b", "b"]},
    }
    blind = {
        "two of three": "rank 2 on c cannot see what rank 0 makes there, and others do",
        "two on a host": "rank 1 on a cannot see what the first rank of that host makes",
        "two of one name": "rank 1 on a, 2 on a cannot see what the first rank of that host makes",
        "two on another host": "rank 2 on b cannot see what the first rank of that host makes",
    }
    jobs = [{"name": name, "error": True, **setting} for name, setting in settings.items()]
    outcome = trainings.fork(3, tmp_path / "out", *jobs)
    for name, words in blind.items():
        errors = [values["error"] for values in outcome.reports("error", name)]
        assert len(errors) == 3
        for error in errors:
            assert words in error
            assert "Give a directory that all hosts share, or one that is each host's own" in error
    for directory in ("x", "y", "z"):
        left = tmp_path / directory
        assert not left.exists() or names(left) == [".lock"]
