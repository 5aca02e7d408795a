"""Limits of CPU time, as containers and Slurm set them by control groups."""

from __future__ import annotations

from pathlib import Path

from smorms3_dist.launch.cpu_limit import cpu_limit

import pytest


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        # Version 2: a container with a namespace of its own, one without, and nested groups.
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/system.slice/docker-0.scope\n", {"cpu.max": "200000 100000\n"}, 2.0),
        (
            "0::/job/step/task\n",
            {"job/cpu.max": "400000 100000", "job/step/cpu.max": "300000 100000"},
            3.0,
        ),
        ("0::/../other\n", {"cpu.max": "50000 100000"}, 0.5),
        # Version 1, in which a group may have a name with a colon, too.
        (
            "4:memory:/x\n3:cpu,cpuacct:/docker/0:1\n",
            {
                "cpu,cpuacct/docker/0:1/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/docker/0:1/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            "1:cpu:/of/the/host\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"},
            2.0,
        ),
        ("", {}, None),
    ],
)
def test_the_smallest_limit_of_all_groups_holds(
    own: str, files: dict[str, str], limit: float | None, tmp_path: Path
) -> None:
    path = tmp_path / "cgroup"
    path.write_text(own)
    root = tmp_path / "root"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert cpu_limit(path, root) == limit
    assert cpu_limit(tmp_path / "nowhere", tmp_path / "nothing") is None
