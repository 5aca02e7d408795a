#!/bin/bash
# What the operator of MPIJobs does with an image, without Kubernetes: tests/system/image.sh calls it
# with an image's directory and one to work in, in namespaces of its own.
#
# A pod is a network, mount, process and IPC namespace with the image as a root that cannot be written,
# a user without capabilities, and what the operator mounts and sets: the key, the host file, variables.
set -euo pipefail

image=$1
work=$2
shift 2

fail() {
    echo "pods.sh: FAILED: $*" >&2
    exit 1
}
say() { printf '\n==> %s\n' "$*"; }

if [ "${1:-}" = --pod ]; then
    name=$2
    shift 2
    hostname "digits-$name"
    pod=$work/pods/$name
    mkdir -p "$pod"
    mount --bind "$image" "$pod"
    mount -o remount,bind,ro "$pod"
    mount -t proc proc "$pod/proc"
    mount -t tmpfs tmpfs "$pod/dev"
    mkdir "$pod/dev/pts" "$pod/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$pod/dev/pts"
    mount -t tmpfs tmpfs "$pod/dev/shm"
    for device in null zero full random urandom tty; do
        touch "$pod/dev/$device"
        mount --bind "/dev/$device" "$pod/dev/$device"
    done
    ln -s pts/ptmx "$pod/dev/ptmx"
    ln -s /proc/self/fd "$pod/dev/fd"
    mount -t tmpfs tmpfs "$pod/tmp"
    mount -t tmpfs -o uid=1000,gid=1000 tmpfs "$pod/home/mpiuser"
    mkdir "$pod/home/mpiuser/.ssh"
    mount --bind "$work/ssh" "$pod/home/mpiuser/.ssh"
    mount --bind "$work/mpi" "$pod/etc/mpi"
    mount --bind "$work/hosts" "$pod/etc/hosts"
    mount --bind "$work/checkpoints" "$pod/checkpoints"
    operator=()
    if [ "$name" = launcher ]; then
        operator=(OMPI_MCA_orte_keep_fqdn_hostnames=true OMPI_MCA_orte_set_default_slots=2
            OMPI_MCA_orte_default_hostfile=/etc/mpi/hostfile
            "OMPI_MCA_plm_rsh_args=-o ConnectionAttempts=10")
    fi
    exec chroot "$pod" setpriv --reuid=1000 --regid=1000 --clear-groups --bounding-set=-all \
        --inh-caps=-all --no-new-privs env -i --chdir=/home/mpiuser HOME=/home/mpiuser \
        PATH=/opt/smorms3/bin:/usr/local/bin:/usr/bin:/bin "${operator[@]}" "$@"
fi

# pod NAME COMMAND...: runs a command as the main process of a pod.
pod() {
    local name=$1
    shift
    exec ip netns exec "$name" unshare --mount --uts --ipc --pid --fork --kill-child \
        bash "$0" "$image" "$work" --pod "$name" "$@"
}
launcher() { (pod launcher "$@"); }

# The main process of a pod, whose unshare has the process ID $1.
main_process() { pgrep --parent "$1"; }

# ended PROCESS SECONDS: waits for a process of this script; its exit status is in $status.
ended() {
    local until=$((SECONDS + $2))
    while kill -0 "$1" 2>/dev/null; do
        [ "$SECONDS" -lt "$until" ] || fail "process $1 has not ended within $2 s"
        sleep 0.2
    done
    status=0
    wait "$1" || status=$?
}

mkdir -p "$work"/{pods,ssh,mpi,checkpoints} "$image"/{checkpoints,etc/mpi}
chown 1000:1000 "$work/checkpoints"
chroot "$image" ssh-keygen -q -t ecdsa -b 521 -m PEM -N '' -f /tmp/id_rsa
chroot "$image" ssh-keygen -q -t ed25519 -N '' -f /tmp/other
mv "$image"/tmp/{id_rsa,id_rsa.pub,other,other.pub} "$work/ssh"
cp "$work/ssh/id_rsa.pub" "$work/ssh/authorized_keys"
chmod 644 "$work"/ssh/*

# Where ip keeps its namespaces: this mount is seen by nobody else.
mount -t tmpfs tmpfs /run
ip link add pods type bridge
ip link set pods up
echo "127.0.0.1 localhost" >"$work/hosts"
number=1
for name in launcher worker-0 worker-1; do
    number=$((number + 1))
    ip netns add "$name"
    ip link add "pod$number" master pods type veth peer name eth0 netns "$name"
    ip link set "pod$number" up
    ip -n "$name" address add "10.77.0.$number/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
    echo "10.77.0.$number digits-$name.digits.default.svc digits-$name" >>"$work/hosts"
done
for name in worker-0 worker-1; do
    echo "digits-$name.digits.default.svc slots=2" >>"$work/mpi/hostfile"
done

start_workers() {
    (pod worker-0 mpi-worker) &
    first=$!
    (pod worker-1 mpi-worker) &
    second=$!
}

say "sshd"
start_workers
worker=digits-worker-0.digits.default.svc
# shellcheck disable=SC2016  # the shell of the session expands it
found=$(launcher ssh "$worker" 'echo "$(id -u) $(hostname) $(command -v mpirun)"')
echo "$found"
[ "$found" = "1000 digits-worker-0 /opt/smorms3/bin/mpirun" ] || fail "this is not the worker"
if launcher ssh -o IdentitiesOnly=yes -o IdentityFile=/home/mpiuser/.ssh/other "$worker" true; then
    fail "sshd accepts any key"
fi

say "smorms3-dist run finds both workers"
launcher smorms3-dist run -n 4 -- hostname | tee "$work/hostnames"
[ "$(grep -c digits-worker-0 "$work/hostnames")" = 2 ] || fail "there are not 2 ranks on worker 0"
[ "$(grep -c digits-worker-1 "$work/hostnames")" = 2 ] || fail "there are not 2 ranks on worker 1"

# These pods, unlike real ones, share their cores.
train=(smorms3-dist run -x OMPI_MCA_mpi_yield_when_idle=1 --checkpoint-dir /checkpoints
    --max-restarts 1 /app/examples/mnist/train_mnist.py --out /tmp/result --epoch 10)
say "a training that is deleted: all pods get SIGTERM"
(pod launcher "${train[@]}") >"$work/training.log" 2>&1 &
running=$!
until=$((SECONDS + 120))
while [ -z "$(ls "$work/checkpoints")" ]; do
    [ "$SECONDS" -lt "$until" ] || { cat "$work/training.log" && fail "there is no checkpoint"; }
    kill -0 "$running" 2>/dev/null || { cat "$work/training.log" && fail "it has ended"; }
    sleep 0.2
done
for process in "$running" "$first" "$second"; do
    kill -TERM "$(main_process "$process")"
done
ended "$running" 60
tail -n 5 "$work/training.log"
[ "$status" = 75 ] || { cat "$work/training.log" && fail "the launcher ended with status $status"; }
for process in "$first" "$second"; do
    ended "$process" 30
    [ "$status" = 0 ] || fail "a worker ended with status $status"
done
launcher smorms3-dist checkpoint verify /checkpoints

say "the same job, made again, goes on"
start_workers
launcher "${train[@]}" 2>&1 | tee "$work/training.log"
grep -q 'going on from step [1-9][0-9]* of /checkpoints' "$work/training.log" || fail "it began anew"
for process in "$first" "$second"; do
    kill -TERM "$(main_process "$process")"
    ended "$process" 10
    [ "$status" = 0 ] || fail "a worker ended with status $status"
done
say "all is well"
