#!/bin/bash
# Runs Chainer's own tests with this package's patches, on the CPU, without those that are slow or need
# a GPU, iDeep, ChainerX or Theano. They are not part of Chainer's package: give a checkout of its
# version 7.8.1, and which tests, if not all (17,000, half an hour).
#
#   bash tests/compat/chainers_own.sh ~/chainer
#   bash tests/compat/chainers_own.sh ~/chainer tests/chainer_tests/serializers_tests
#
# They need mock, and those of onnx_chainer onnxruntime: .venv/bin/python -m pip install mock onnxruntime
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
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
    parametrize_device: of several devices
    parametrize_device_name: of several devices
    slow: takes long
    theano: needs Theano
INI
cd "$checkout"
if [ $# -eq 0 ]; then
    set -- tests/chainer_tests
fi
PYTHONPATH=$work python -m pytest -q -p no:cacheprovider -W ignore -c "$work/pytest.ini" \
    --rootdir "$checkout" --continue-on-collection-errors \
    -m 'not (chainerx or cudnn or gpu or ideep or multi_gpu or slow or theano)' "$@"
