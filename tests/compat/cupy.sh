#!/bin/bash
# Runs the tests of this directory with CuPy, and those of NVRTC with the NVRTC that comes with it, on
# a machine with or without a GPU, in a virtual environment of its own. tests/run.sh leaves it out
# unless it is told --cupy, because it downloads 2.1 GB for CUDA 12, 1.6 GB for CUDA 13, and keeps about
# 3 GB for each. After that the tests take about three minutes, and two from the second time on, when
# Chainer's kernels are compiled.
#
#   bash tests/compat/cupy.sh                    the extra cuda12
#   bash tests/compat/cupy.sh cuda13             the extra cuda13
#   CUPY=13.6 bash tests/compat/cupy.sh cuda12   an older CuPy than the extra's
#
# PYTHON names the CPython to use. The environments are made in .cache/cupy-tests in the checkout, and
# are used again the next time; remove the directory to start afresh. It needs a package index.
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"
unset PYTHONPATH PYTHONHOME PYTHONWARNINGS

extra=${1:-cuda12}
case $extra in
cuda12 | cuda13) ;;
*)
    echo "cupy.sh: '$extra' is not an extra: cuda12 or cuda13" >&2
    exit 2
    ;;
esac
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
export OMPI_MCA_pml="${OMPI_MCA_pml:-ob1}"

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
environment=$root/.cache/cupy-tests/$extra-${CUPY:-newest}-$version
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
constraints=constraints.txt
if [ -n "${CUPY:-}" ]; then
    constraints=$environment/constraints.txt
    grep -v '^cupy-' constraints.txt >"$constraints"
fi
install=("$environment/bin/python" -m pip install --quiet --disable-pip-version-check
    -c "$constraints")
"${install[@]}" pip
"${install[@]}" --build-constraint build-constraints.txt -e '.[chainer,mpi]' pytest hypothesis \
    nvidia-cuda-nvdisasm
tests=(tests/compat tests/device/test_gpu_check.py tests/kernels/test_nvrtc.py)
if [ -z "${CUPY:-}" ]; then
    "${install[@]}" -e ".[$extra]"
else
    # Before 14, CuPy neither asks for the wheels with the CUDA libraries nor looks there.
    number=${extra#cuda}
    libraries=cublas,cudart,cufft,curand,cusolver,cusparse,nvrtc
    "${install[@]}" "cupy-cuda${number}x==$CUPY.*" "nvidia-nccl-cu$number" \
        "cuda-toolkit[$libraries]==$number.*"
    for directory in "$environment"/lib/python*/site-packages/nvidia/*/lib; do
        LD_LIBRARY_PATH=$directory:${LD_LIBRARY_PATH:-}
    done
    export LD_LIBRARY_PATH
    # It warns at import that there is no cuDNN, which the other tests take for an error.
    tests=(tests/compat/test_cupy.py tests/device/test_gpu_check.py)
fi
"$environment/bin/python" -c 'import cupy, numpy
print("cupy.sh: CuPy", cupy.__version__, "with NumPy", numpy.__version__)'
exec "$environment/bin/python" -m pytest -q -p no:cacheprovider "${tests[@]}"
