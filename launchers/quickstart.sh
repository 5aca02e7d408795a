#!/bin/bash
# Does all the set-up, then trains examples/mnist on real data, on two ranks of this machine.
#
#   bash launchers/quickstart.sh                           5000 MNIST digits
#   bash launchers/quickstart.sh --compare                 and the same with ChainerMN's optimizer
#   bash launchers/quickstart.sh --dataset fashion-mnist   70000 images, from a local directory
#   RANKS=4 bash launchers/quickstart.sh --help            all that the example can do
#
# PYTHON names the CPython to use, RANKS the number of ranks.
set -eu
# shellcheck source=launchers/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ranks=${RANKS:-2}
case $ranks in
'' | *[!0-9]* | 0*) fail "RANKS=$ranks: the number of ranks must be a whole number from 1 up" ;;
esac
threads=$(($(nproc) / ranks))
if [ "$threads" -lt 1 ]; then
    threads=1
fi
# Ranks that all take every core for their linear algebra slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-$OMP_NUM_THREADS}"

printf 'quickstart: training on %s ranks, OMP_NUM_THREADS=%s\n' "$ranks" "$OMP_NUM_THREADS"
mpirun -n "$ranks" --map-by :OVERSUBSCRIBE --bind-to none \
    python -m smorms3_dist "$root/examples/mnist/train_mnist.py" --out "$root/result" "$@"
