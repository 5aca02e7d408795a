#!/bin/bash
# Builds an image of docker/Dockerfile with buildah, looks at it, and runs it: the health check, a
# training on 2 ranks, and what an MPIJob does with it, in pods made of namespaces: two workers with
# sshd, and a launcher that trains on both of them. Of images for GPUs, instead of the pods: that CuPy
# finds its libraries, and that NVRTC compiles the kernels.
#
#   bash tests/system/image.sh           the image for CPUs
#   bash tests/system/image.sh cuda13    that for GPUs (or cuda12): downloads 1.6 GB, takes 15 GB meanwhile
#
# Needs root, Debian's apt-get (for buildah, debootstrap and iproute2, where they are not there yet) and
# a network or its stand-in: how pip finds the package index is taken over from this machine. Where one
# of these is missing it says so and ends with status 77. The base image, which needs no registry, is
# made of Debian 12 with Debian's Python 3.11; it is kept in .cache/image, everything else is removed.
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cache=$root/.cache/image
work=$cache/work

say() { printf '\n==> %s\n' "$*"; }
skip() {
    echo "image.sh: skipped: $*"
    exit 77
}
fail() {
    echo "image.sh: FAILED: $*" >&2
    exit 1
}

device=${1:-cpu}
case $device in
cpu | cuda12 | cuda13) ;;
*)
    echo "image.sh: '$device' is not a device: cpu, cuda12 or cuda13" >&2
    exit 2
    ;;
esac
if [ "${2:-}" != --inside ]; then
    [ "$(id -u)" -eq 0 ] || skip "it must run as root, for chroot and namespaces"
    unshare --mount --net --pid --fork true 2>/dev/null || skip "there are no namespaces to be had"
    missing=()
    for tool in buildah debootstrap ip:iproute2; do
        command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        command -v apt-get >/dev/null || skip "there is no ${missing[*]}, and no apt-get"
        say "installing ${missing[*]}"
        { apt-get update -qq && apt-get install -qq --no-install-recommends "${missing[@]}"; } \
            >/dev/null || skip "apt-get cannot install ${missing[*]}"
    fi
    mkdir -p "$cache"
    rm -rf "$work"
    trap 'rm -rf "$work"' EXIT
    # Mounts and processes of its own: they are gone when it ends.
    unshare --mount --pid --fork --kill-child --mount-proc bash "$0" "$device" --inside
    exit
fi

# buildah keeps a cache there, whatever it is told: this mount is seen by nobody else.
mkdir -p "$work/tmp" /var/lib/containers
mount -t tmpfs tmpfs /var/lib/containers
export TMPDIR=$work/tmp BUILDAH_ISOLATION=chroot
container=smorms3-test tag=smorms3-dist:$device
build() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }

# The base image: what Debian has in the place of what python:VERSION-slim-bookworm has.
python=3.11
if [ ! -e "$cache/base.tar" ]; then
    say "making the base system"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm \
        "$work/base" >"$work/debootstrap.log" ||
        { tail "$work/debootstrap.log" && skip "debootstrap cannot make a Debian 12"; }
    ln -s /usr/bin/python3 "$work/base/usr/local/bin/python"
    rm -rf "$work"/base/var/cache/apt/*.bin "$work"/base/var/cache/apt/archives/*.deb \
        "$work"/base/var/lib/apt/lists/*
    tar -C "$work/base" --create . >"$cache/base.tar.new"
    mv "$cache/base.tar.new" "$cache/base.tar"
    rm -rf "$work/base"
fi
mkdir "$work/context"
ln "$cache/base.tar" "$work/context/base.tar"
printf 'FROM scratch\nADD base.tar /\nCMD ["python"]\n' >"$work/context/Dockerfile"
build bud --quiet --tag "python:$python-slim-bookworm" "$work/context" >/dev/null

# How pip finds the index: all settings of this machine in one file, and the files that they name.
python3 "$root/tests/system/pip_settings.py" "$work/pip.conf" >"$work/named"
volumes=(--volume "$work/pip.conf:/etc/pip.conf:ro")
while read -r file; do
    volumes+=(--volume "$file:$file:ro")
done < <(printf '%s\n' /etc/ssl/certs/ca-certificates.crt | sort -u - "$work/named")

say "building the image"
SECONDS=0
(cd "$root" && build bud --quiet --pull-never --network=host --format docker --file docker/Dockerfile \
    --build-arg "PYTHON=$python" --build-arg "DEVICE=$device" "${volumes[@]}" --tag "$tag" .) >"$work/build.log" 2>&1 ||
    { tail -n 40 "$work/build.log" && fail "the image cannot be built"; }
build from --quiet --pull-never --name "$container" "$tag" >/dev/null
image=$(build mount "$container")
echo "took $SECONDS s; $(du -sm "$image" | cut -f1) MB, of which the base has" \
    "$(($(stat -c %s "$cache/base.tar") >> 20)) MB"

say "what is in it"
setting() { build inspect --type image --format "{{.Docker.Config.$1}}" "$tag"; }
[ "$(setting User)" = 1000:1000 ] || fail "its user is $(setting User)"
for path in etc/pip.conf opt/pip root/.cache/pip build; do
    # The mount point of a volume may stay behind, empty.
    [ -z "$(find "$image/$path" -type f -size +0 2>/dev/null)" ] || fail "/$path is in the image"
done
[ -z "$(find "$image/etc/ssh" -name 'ssh_host_*')" ] || fail "host keys are in the image"
[ -z "$(find "$image/app" "$image/opt" -user 1000)" ] || fail "its user could change the software"
echo "user $(setting User), command $(setting Cmd)"

inside() { build run --user 1000:1000 "$container" -- "$@"; }
say "smorms3-dist --help"
inside smorms3-dist --help
say "the health check"
build inspect --type image "$tag" | python3 -c '
import json, sys
words = json.load(sys.stdin)["Docker"]["config"]["Healthcheck"]["Test"]
assert words[0] == "CMD", words
sys.stdout.write("\0".join(words[1:]))
' >"$work/health"
mapfile -d '' -t health <"$work/health"
inside "${health[@]}"
say "a training on 2 ranks"
inside smorms3-dist run -n 2 /app/examples/mnist/train_mnist.py --epoch 2 --out /tmp/result

if [ "$device" != cpu ]; then
    say "CuPy, its libraries, and the kernels"
    # shellcheck disable=SC2016
    inside python -W ignore -c '
import smorms3_dist, cupy
from cupy.cuda import nccl, nvrtc
from smorms3_dist.kernels import cuda, tables
code, names = cuda.compile_kernels(nvrtc, ["pack<float>", "update<Smorms3, float, float, float>"], 90, False)
print("CuPy", cupy.__version__, "NCCL", nccl.get_version(), "NVRTC", nvrtc.getVersion(), len(code), "bytes")
assert len(names) == 2 and nccl.get_unique_id()'
    say "the image for $device works as far as it can without a GPU"
    exit
fi
exec unshare --net bash "$root/tests/system/pods.sh" "$image" "$work"
