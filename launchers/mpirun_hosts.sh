#!/bin/bash
# Trains on several hosts with Open MPI's mpirun alone, for where `smorms3-dist run` is not wanted.
#
#   bash launchers/mpirun_hosts.sh -H h1:4,h2:4 train.py ARGUMENTS
#   bash launchers/mpirun_hosts.sh --hostfile hosts train.py ARGUMENTS    lines such as: h1 slots=4
#   bash launchers/mpirun_hosts.sh -H h1:4,h2:4 --shard train.py ARGUMENTS    for a ChainerMN script as it is
#
# Every host has this Python environment and the script at the same paths, and takes ssh from this one
# without a password. Variables that start with SMORMS3_, CHAINER, CUPY_, NCCL_, UCX_ or OMP_ go to all
# hosts, and so do those that FORWARD names ("NAME NAME"). OMP_NUM_THREADS, the threads of a rank, is 1 if
# it is not set; PYTHON names the interpreter, and mpirun is the one on the PATH.
#
# A rank that fails ends the job, and a host that is cut off is noticed within 10 s. What only the
# launcher does: restarts, limits on time, and a failure where mpirun ends with 0 after a host was lost.
set -eu

usage() {
    echo "usage: bash mpirun_hosts.sh {-H HOST:SLOTS,... | --hostfile FILE} [--shard[=OPTIONS]] SCRIPT [ARGUMENTS]" >&2
    exit 2
}
[ $# -ge 3 ] || usage
case $1 in
-H | --host) hosts=(--host "$2") ;;
--hostfile)
    [ -r "$2" ] || { echo "mpirun_hosts.sh: there is no host file $2" >&2 && exit 2; }
    hosts=(--hostfile "$2")
    ;;
*) usage ;;
esac
shift 2
shard=()
case $1 in --shard | --shard=*)
    shard=("$1")
    shift
    ;;
esac
[ -f "${1:-}" ] || { echo "mpirun_hosts.sh: there is no script ${1:-}" >&2 && exit 2; }

python=$(command -v "${PYTHON:-python3}")
forwarded=(-x PATH)
for name in $(compgen -e | grep -E '^(SMORMS3_|CHAINER|CUPY_|NCCL_|UCX_|OMP_)') ${FORWARD:-}; do
    forwarded+=(-x "$name")
done
# Else ranks would all take every core of their host for their linear algebra.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    forwarded+=(-x OMP_NUM_THREADS=1)
fi

if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Without the keep-alive options mpirun waits for a host that is cut off for ten minutes.
exec mpirun "${hosts[@]}" --map-by slot --bind-to none "${forwarded[@]}" \
    --prtemca oob_tcp_keepalive_time 5 --prtemca oob_tcp_keepalive_intvl 2 \
    --prtemca oob_tcp_keepalive_probes 2 "$python" -m smorms3_dist ${shard[@]+"${shard[@]}"} "$@"
