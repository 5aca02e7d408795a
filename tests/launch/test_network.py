"""By which interfaces ranks talk."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from smorms3_dist.launch.network import Connected, interfaces_of, variables

import pytest

THERE = [
    (name, ip_address(text))
    for name, text in (("docker0", "172.17.0.1"), ("eth0", "10.0.0.1"), ("eth1", "10.1.0.1"))
]
LOCAL = Connected(True, "172.17.0.1", ("docker0",))


def test_ranks_of_one_host_are_left_alone() -> None:
    assert interfaces_of({0: LOCAL, 1: LOCAL}, wanted=False, there=THERE) == {0: [], 1: []}


def test_hosts_talk_by_what_connects_them_to_the_launchers() -> None:
    everybody = {
        0: LOCAL,
        1: Connected(False, "10.0.0.1", ("ens3",)),
        2: Connected(False, "10.1.0.1", ("ens4",)),
    }
    found = interfaces_of(everybody, wanted=False, there=THERE)
    assert found == {0: ["eth0", "eth1"], 1: ["ens3"], 2: ["ens4"]}
    assert interfaces_of({1: everybody[1]}, wanted=False, there=THERE) == {1: ["ens3"]}
    # What the user wants counts, on one host, too.
    assert interfaces_of(everybody, wanted=True, there=THERE) == {
        0: ["docker0"],
        1: ["ens3"],
        2: ["ens4"],
    }


@pytest.fixture
def no_rdma(tmp_path: Path) -> Path:
    return tmp_path / "infiniband"


def test_mpi_nccl_and_ucx_are_told_where_nobody_has(no_rdma: Path, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert variables([], home, False, no_rdma) == {}
    everything = {
        "OMPI_MCA_btl_tcp_if_include": "eth0,eth1",
        "NCCL_SOCKET_IFNAME": "=eth0,eth1",
        "UCX_NET_DEVICES": "eth0,eth1",
    }
    names = ["eth0", "eth1"]
    assert variables(names, home, False, no_rdma) == everything
    for name in everything:
        rest = {key: value for key, value in everything.items() if key != name}
        assert variables(names, {**home, name: "x"}, False, no_rdma) == rest
        assert variables(names, {**home, name: "x"}, True, no_rdma) == everything
    excluded = {**home, "OMPI_MCA_btl_tcp_if_exclude": "docker0"}
    assert "OMPI_MCA_btl_tcp_if_include" not in variables(names, excluded, False, no_rdma)
    settings = tmp_path / ".openmpi" / "mca-params.conf"
    settings.parent.mkdir()
    settings.write_text("# btl_tcp_if_include = eth9\n")
    assert "OMPI_MCA_btl_tcp_if_include" in variables(names, home, False, no_rdma)
    settings.write_text("  btl_tcp_if_exclude = lo\n")
    assert "OMPI_MCA_btl_tcp_if_include" not in variables(names, home, False, no_rdma)


def test_ucx_is_not_kept_from_rdma(no_rdma: Path) -> None:
    (no_rdma / "mlx5_0").mkdir(parents=True)
    for wanted in (False, True):
        assert "UCX_NET_DEVICES" not in variables(["eth0"], {}, wanted, no_rdma)
