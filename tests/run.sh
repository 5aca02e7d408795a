#!/bin/bash
# Does all the set-up, then runs the linters, builds docs/ and runs the tests. Arguments go to pytest:
#
#   bash tests/run.sh                 everything but the tests with CuPy
#   bash tests/run.sh -m 'not slow'   without the slow tests
#   bash tests/run.sh --cupy          then also tests/compat/cupy.sh cuda13, which downloads 1.6 GB
#
# --cupy comes before pytest's arguments, which are not for that part. PYTHON names the CPython to use.
set -eu
with_cupy=
if [ "${1:-}" = --cupy ]; then
    with_cupy=yes
    shift
fi
# shellcheck source=launchers/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launchers/setup.sh"
cd "$root"
# Temporary directories stay in the checkout, whatever TMPDIR is.
export PYTEST_DEBUG_TEMPROOT="$cache/tmp"

ruff check .
ruff format --check .
mypy
codespell
bash docs/build.sh
# A test starts up to five ranks: few tests at once keep many cores busy.
python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
if [ -n "$with_cupy" ]; then
    bash tests/compat/cupy.sh cuda13
fi
