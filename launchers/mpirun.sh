#!/bin/bash
# Trains on this host with Open MPI's mpirun alone, for where `smorms3-dist run` is not wanted.
#
#   bash launchers/mpirun.sh -n 4 train.py ARGUMENTS
#   bash launchers/mpirun.sh -n 4 --shard train.py ARGUMENTS    for a ChainerMN script as it is
#
# To be added to `mpirun -n 4 python -m smorms3_dist train.py` is what this shows: ranks are not bound, each
# with all its threads, to one core; there may be more ranks than cores; ranks that wait leave their core to
# others; root may start them; and each has its share of the cores for its threads, if OMP_NUM_THREADS is
# not set. PYTHON names the interpreter. mpirun is the one beside it, or else on the PATH.
set -eu

usage() {
    echo "usage: bash mpirun.sh -n RANKS [--shard[=OPTIONS]] SCRIPT [ARGUMENTS]" >&2
    exit 2
}
[ $# -ge 3 ] && [ "$1" = -n ] && [ "$2" -gt 0 ] 2>/dev/null || usage
ranks=$2
shift 2
shard=()
case $1 in --shard | --shard=*)
    shard=("$1")
    shift
    ;;
esac
[ -f "${1:-}" ] || { echo "mpirun.sh: there is no script ${1:-}" >&2 && exit 2; }

python=$(command -v "${PYTHON:-python3}")
mpirun=$(dirname "$python")/mpirun
[ -x "$mpirun" ] || mpirun=mpirun
export OMPI_MCA_mpi_yield_when_idle=1
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

exec "$mpirun" -n "$ranks" --map-by :OVERSUBSCRIBE --bind-to none \
    "$python" -m smorms3_dist ${shard[@]+"${shard[@]}"} "$@"
