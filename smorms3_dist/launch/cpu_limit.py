"""How much time of CPUs the control groups of this process leave it, in both versions of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cpu_limit(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """The smallest limit of its groups and of those that these are in, in CPUs.

    Args:
        own: The file that says in which groups this process is.
        root: Where groups are mounted.

    Returns:
        The limit; ``None`` if there is none.
    """
    limits = [limit for group in _groups(own, root) for limit in _limits(group)]
    return min(limits, default=None)


def _groups(own: Path, root: Path) -> Iterator[Path]:
    """The folders of groups, from the outermost, which in a container is its own.

    The path of a group may be that on the host, which a container does not see.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    paths = {"": "/", "cpu": "/"}
    mounts = {"": [root, root / "unified"], "cpu": [root / "cpu", root / "cpu,cpuacct"]}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in {"", "cpu"} & set(controllers.split(",")):
            paths[controller] = path
    for controller, path in paths.items():
        for mount in mounts[controller]:
            group = mount
            yield group
            for name in path.split("/"):
                if name not in ("", ".."):
                    group = group / name
                    yield group


def _limits(group: Path) -> Iterator[float]:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        except OSError:
            return
    if quota.strip() not in ("max", "-1"):
        yield int(quota) / int(period)
