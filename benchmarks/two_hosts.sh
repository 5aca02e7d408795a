#!/bin/bash
# Runs a benchmark on two hosts of this machine, half of the ranks on each, over links of a given rate.
#
#   [RANKS=N] bash benchmarks/two_hosts.sh [RATE] [MODULE ARGUMENTS...]     of 2 ranks by default
#   bash benchmarks/two_hosts.sh 1gbit benchmarks.network --steps 5     is what it does by itself
#   PEER_PYTHON=PATH bash ...                      runs the module with another interpreter
#
# A host is a network of its own and a name of its own; tc limits what leaves it. Needs root, iproute2
# and Open MPI's mpirun. Everything is gone with this process.
set -eu
export PATH=$PATH:/usr/sbin:/sbin
cd "$(dirname "$0")/.."

if [ "${1:-}" = --in-namespaces ]; then
    shift
    rate=$1 work=$2
    shift 2
    ip link set lo up
    ip link add bridge type bridge
    ip link set bridge up
    for number in 1 2; do
        unshare --net --uts bash -c "hostname bench$number; exec sleep infinity" &
        pid=$!
        until [ "$(nsenter --target $pid --uts hostname)" = bench$number ]; do sleep 0.1; done
        echo "$pid" >"$work/bench$number"
        ip link add "to$number" type veth peer name eth0 netns "$pid"
        ip link set "to$number" master bridge up
        nsenter --target "$pid" --net bash -c "
            ip link set lo up
            ip address add 10.78.0.$number/24 dev eth0
            ip link set eth0 up
            tc qdisc add dev eth0 root tbf rate $rate burst 512kb latency 100ms"
        echo "10.78.0.$number bench$number" >>"$work/hosts"
    done
    mount --bind "$work/hosts" /etc/hosts
    # mpirun starts its daemon on the other host by this, in the place of ssh.
    cat >"$work/enter" <<'END'
#!/bin/bash
host=$1
shift
exec nsenter --target "$(cat "$(dirname "$0")/$host")" --net --uts bash -c "$*"
END
    chmod +x "$work/enter"
    ranks=${RANKS:-2}
    half=$(((ranks + 1) / 2))
    "$work/enter" bench1 exec mpirun --prtemca plm_ssh_agent "$work/enter" -n "$ranks" \
        --host "bench1:$half,bench2:$half" --map-by slot --bind-to none -x GLOO_SOCKET_IFNAME=eth0 \
        "${PEER_PYTHON:-$(command -v python)}" -m "$@"
    exit
fi

rate=${1:-1gbit}
shift || true
[ $# -gt 0 ] || set -- benchmarks.network --steps 5
. launchers/setup.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp /etc/hosts "$work/hosts"
# What mpirun of an earlier run has left in a temporary directory would be taken for its own: processes
# have the same numbers each time.
export TMPDIR=$work
export OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,sm,tcp OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
unshare --net --mount --pid --fork --kill-child --mount-proc \
    bash benchmarks/two_hosts.sh --in-namespaces "$rate" "$work" "$@"
