#!/bin/bash
# Runs the two commands on a minimal Debian: python3, python3-venv and ca-certificates, no pip on the
# PATH, no compiler, no MPI, no ssh. As root, as a user, and as a user without home or name, each in a
# fresh checkout, each command twice; then looks for what is left outside the checkouts.
#
#   bash tests/system/minimal_debian.sh bookworm                    Debian 12, with CPython 3.11
#   bash tests/system/minimal_debian.sh trixie                      Debian 13, with CPython 3.13
#   bash tests/system/minimal_debian.sh sid                         unstable: CPython 3.14, and beside
#                                                                   it 3.15, which the user takes
#   bash tests/system/minimal_debian.sh sid tests/compat -m 'not slow'   arguments go to pytest
#
# Needs root, debootstrap, git, and a network or its stand-in: debootstrap takes the mirror that it takes
# on this machine, and how pip finds the package index is taken over from it (all settings of pip, proxy
# and certificate variables, and the files that these name). The base systems are kept in .cache/debian
# for the next time.
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
[ "$(id -u)" -eq 0 ] || { echo "minimal_debian.sh: must run as root, for chroot" >&2; exit 1; }
if [ "${1:-}" != --inside ]; then
    case ${1:-} in
    bookworm | trixie | sid) mkdir -p "$root/.cache/debian/$1" ;;
    *) echo "usage: bash tests/system/minimal_debian.sh bookworm|trixie|sid [PYTEST ARGUMENTS]" >&2; exit 2 ;;
    esac
    # Mounts and processes of its own: they are gone when it ends.
    exec unshare --mount --pid --fork --kill-child bash "$0" --inside "$@"
fi
suite=$2
shift 2
base=$root/.cache/debian/$suite/base
system=$root/.cache/debian/$suite/system
packages=python3,python3-venv,ca-certificates
newest=python3
if [ "$suite" = sid ]; then
    newest=python3.15
    packages+=,$newest,$newest-venv
fi

say() { printf '\n==> %s\n' "$*"; }

if [ ! -e "$base.complete" ]; then
    say "making the base system in $base"
    rm -rf "$base"
    debootstrap --variant=minbase --include="$packages" "$suite" "$base"
    touch "$base.complete"
fi
rm -rf "$system"
cp -a "$base" "$system"
for tool in pip pip3 gcc cc mpirun mpiexec ssh git; do
    if chroot "$system" sh -c "command -v $tool"; then
        echo "minimal_debian.sh: the base system has $tool; delete $base.complete" >&2
        exit 1
    fi
done

# The network, and how pip finds the index.
cp -L /etc/resolv.conf /etc/hosts "$system/etc/"
cp -L /etc/ssl/certs/ca-certificates.crt "$system/etc/ssl/certs/"
network=()
named=$(python3 "$root/tests/system/pip_settings.py" "$system/etc/pip.conf")
while IFS= read -r -d '' setting; do
    case ${setting%%=*} in
    SSL_CERT_FILE | REQUESTS_CA_BUNDLE) named+=$'\n'${setting#*=} && network+=("$setting") ;;
    *_proxy | *_PROXY) network+=("$setting") ;;
    esac
done < <(env -0)
while read -r file; do
    if [ -f "$file" ]; then install -D -m 644 "$file" "$system$file"; fi
done <<<"$named"

mount -t proc proc "$system/proc"
mount -t tmpfs tmpfs "$system/dev"
mkdir "$system/dev/pts" "$system/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$system/dev/pts"
mount -t tmpfs tmpfs "$system/dev/shm"
for device in null zero full random urandom tty; do
    touch "$system/dev/$device"
    mount --bind "/dev/$device" "$system/dev/$device"
done
ln -s pts/ptmx "$system/dev/ptmx"
ln -s /proc/self/fd "$system/dev/fd"

chroot "$system" useradd --uid 1000 --create-home tester
for checkout in root tester stranger; do
    mkdir "$system/srv/$checkout"
    (cd "$root" && git ls-files -co --exclude-standard -z | tar --null --files-from - --create) |
        tar -C "$system/srv/$checkout" --extract --no-same-owner
done
chown -R 1000:1000 "$system/srv/tester"
chown -R 54321:54321 "$system/srv/stranger"
touch "$system/before"

# run USER CHECKOUT COMMAND...: in the system, with next to nothing in the environment. In one checkout
# it is always the same Python.
run() {
    local user=$1 checkout=$2 home=() python=python3
    shift 2
    [ "$checkout" != tester ] || python=$newest
    case $user in
    root) home=(HOME=/root) ids=0:0 ;;
    tester) home=(HOME=/home/tester) ids=1000:1000 ;;
    stranger) ids=54321:54321 ;; # has neither a name nor a home
    esac
    say "$user in /srv/$checkout, $python: $*"
    SECONDS=0
    # shellcheck disable=SC2016  # the shell inside expands it
    chroot --userspec="$ids" --groups= "$system" env -i PATH=/usr/bin:/bin PYTHON="$python" "${home[@]}" \
        "${network[@]}" bash -c 'cd "$1" && shift && "$@"' - "/srv/$checkout" "$@"
    echo "==> took $SECONDS s"
}
run root root bash launchers/quickstart.sh
run root root bash launchers/quickstart.sh --compare
run root root bash tests/run.sh "$@"
run tester tester bash tests/run.sh "$@"
run tester tester bash launchers/quickstart.sh
run root tester bash launchers/quickstart.sh
run tester tester bash launchers/quickstart.sh
run stranger stranger bash launchers/quickstart.sh

say "looking for what is left outside the checkouts"
left=$(
    find "$system" -xdev -cnewer "$system/before" -not -path "$system/srv/*" -not -path "$system/tmp"
    # Open MPI's own, of ranks that tests have killed under plain mpirun.
    find "$system/dev/shm" -mindepth 1 -not -name 'sm_segment.*'
)
if [ -n "$left" ]; then
    printf 'left outside the checkouts:\n%s\n' "$left" >&2
    exit 1
fi
echo "nothing"
