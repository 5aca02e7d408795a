#!/bin/bash
# Runs Chainer's own tests with this package's patches, on the CPU, without those that are slow or need
# a GPU, iDeep, ChainerX or Theano. They are not part of Chainer's package: give a checkout of its
# version 7.8.1, and which tests, if not all (17,000, half an hour).
#
#   bash tests/compat/chainers_own.sh ~/chainer
#   bash tests/compat/chainers_own.sh ~/chainer tests/chainer_tests/serializers_tests
#   bash tests/compat/chainers_own.sh --ranks 2 ~/chainer     ChainerMN's, each file under mpirun
#
# They need mock, and those of onnx_chainer onnxruntime: .venv/bin/python -m pip install mock onnxruntime
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
ranks=
if [ "${1:-}" = --ranks ]; then
    ranks=$2
    shift 2
fi
if [ $# -eq 0 ] || [ ! -d "$1/tests/chainer_tests" ]; then
    echo "chainers_own.sh: give the directory of a checkout of Chainer 7.8.1" >&2
    exit 2
fi
checkout=$1
shift
# shellcheck source=launchers/setup.sh
. "$root/launchers/setup.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Its tests import Chainer in many places: the patches come before all of them.
echo "import smorms3_dist.compat" >"$work/sitecustomize.py"
cat >"$work/pytest.ini" <<'INI'
[pytest]
markers =
    chainerx: needs ChainerX
    cudnn: needs cuDNN
    gpu: needs a GPU
    ideep: needs iDeep
    multi_gpu: needs several GPUs
    nccl: needs NCCL
    parametrize_device: of several devices
    parametrize_device_name: of several devices
    slow: takes long
    theano: needs Theano
INI
cd "$checkout"
export PYTHONPATH=$work
without='chainerx or cudnn or gpu or ideep or multi_gpu or nccl or slow or theano'
own=(python -m pytest -q -p no:cacheprovider -W ignore -c "$work/pytest.ini" --rootdir "$checkout"
    --continue-on-collection-errors -m "not ($without)")
if [ -z "$ranks" ]; then
    [ $# -gt 0 ] || set -- tests/chainer_tests
    "${own[@]}" "$@"
    exit
fi

# What all ranks print is the same: that of rank 0 is shown. A file by itself, since ranks that fail
# differently wait for each other; test_mnist.py would download its data.
[ $# -gt 0 ] || set -- tests/chainermn_tests
mapfile -t files < <(find "$@" -name 'test_*.py' ! -name test_mnist.py | sort)
status=0
for file in "${files[@]}"; do
    echo "==> $file"
    # shellcheck disable=SC2016  # the shell of each rank expands it
    timeout --kill-after=5 300 mpirun -n "$ranks" --oversubscribe bash -c '
        [ "$OMPI_COMM_WORLD_RANK" = 0 ] || exec >/dev/null 2>&1
        exec "$@"' - "${own[@]}" "$file" || {
        result=$?
        [ $result -eq 5 ] || status=1 # 5: no test is left
    }
done
exit $status
