#!/bin/bash
# Does all the set-up, then runs the linters and the tests. Arguments go to pytest:
#
#   bash tests/run.sh                 everything
#   bash tests/run.sh -m 'not slow'   without the slow tests
#
# PYTHON names the CPython to use.
set -eu
# shellcheck source=launchers/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launchers/setup.sh"
cd "$root"
# Temporary directories stay in the checkout, whatever TMPDIR is.
export PYTEST_DEBUG_TEMPROOT="$cache/tmp"

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
