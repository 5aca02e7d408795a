#!/bin/bash
# The main process of an MPIJob's worker: runs sshd on port 2222, without root, with a host key that is
# made here and now.
#
# When the worker is to end (SIGTERM), it takes no more connections, but ranks that run have the pod's
# grace period to save a checkpoint: the launcher, which ends at the same time, asks them to. Were sshd
# itself the main process, they would be killed at once.
set -eu

listener=
ending=
end() {
    ending=yes
    if [ -n "$listener" ]; then
        kill "$listener" 2>/dev/null || true
    fi
}
trap end TERM INT

keys=$(mktemp -d)
ssh-keygen -q -t ed25519 -N '' -f "$keys/host_key"
/usr/sbin/sshd -D -e -h "$keys/host_key" &
listener=$!
if [ -n "$ending" ]; then
    end
fi
status=0
wait "$listener" || status=$?
if [ -z "$ending" ]; then
    echo "mpi-worker: sshd has ended with status $status" >&2
    exit 1
fi
# The signal may have come before sshd's end.
wait "$listener" 2>/dev/null || true

# Only sessions are left now, and what they have started.
while grep -qsxE 'sshd|prted' /proc/[0-9]*/comm; do
    sleep 0.5
done
