#!/bin/bash
# Two hosts on this machine, and `smorms3-dist run` on them: a training on both; a host that is cut off
# in mid-training, with and without a restart on the one that remains; interfaces of Docker's, which do
# not connect them; a rank that raises on the other host; Ctrl-C; hosts that cannot be reached.
#
#   bash tests/system/two_hosts.sh                  sets everything up in .venv
#   VENV=DIRECTORY bash tests/system/two_hosts.sh   takes the virtual environment there
#
# Takes 2 minutes on 2 cores. Needs root, and Debian's apt-get for openssh-server and iproute2 where
# they are not there yet; where one of these is missing it says so and ends with status 77.
#
# A host is a set of namespaces (network, names, mounts, IPC, processes) with an sshd, and a bridge joins
# the two: nothing of the machine's own network, ssh keys or files is used or changed. What they share,
# as hosts share a file system, is the checkout and /run, in the memory. All of it is gone with the
# process that holds it, however that ends.
set -eu
export PATH=$PATH:/usr/sbin:/sbin

work=/run/two_hosts
declare -A address=([h1]=10.77.0.1 [h2]=10.77.0.2)

say() { printf '\n==> %s\n' "$*"; }
skip() {
    echo "two_hosts.sh: skipped: $*"
    exit 77
}
fail() {
    echo "two_hosts.sh: FAILED: $*" >&2
    exit 1
}

prepare() {
    [ "$(id -u)" -eq 0 ] || skip "it must run as root, for namespaces"
    unshare --mount --net --uts --ipc --pid --fork true 2>/dev/null ||
        skip "there are no namespaces to be had"
    local missing=()
    for tool in sshd:openssh-server ip:iproute2; do
        command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        command -v apt-get >/dev/null || skip "there is no ${missing[*]}, and no apt-get"
        say "installing ${missing[*]}"
        { apt-get update -qq && apt-get install -qq --no-install-recommends "${missing[@]}"; } \
            >/dev/null || skip "apt-get cannot install ${missing[*]}"
    fi
    if [ -n "${VENV:-}" ]; then
        export PATH=$VENV/bin:$PATH
        export OMPI_MCA_pml=ob1 OMPI_MCA_mpi_yield_when_idle=1
    else
        . launchers/setup.sh
    fi
}

# A host. $1: its name.
be_host() {
    hostname "$1"
    mount --bind "$work/hosts" /etc/hosts
    mount --bind "$work/ssh_config" /etc/ssh/ssh_config
    mount -t tmpfs tmpfs /dev/shm
    # Neither the user's keys nor the user's settings.
    if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
    ip link set lo up
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
    ip address add "${address[$1]}/24" dev eth0
    ip link set eth0 up
    exec "$(command -v sshd)" -D -f "$work/$1/sshd_config" -E "$work/$1/sshd.log"
}

# Makes both hosts; their processes with number 1 are in pid[h1] and pid[h2].
make_hosts() {
    mkdir /run/sshd "$work"
    ssh-keygen -q -t ed25519 -N '' -f "$work/key"
    cp /etc/hosts "$work/hosts"
    cat >"$work/ssh_config" <<END
Host *
    IdentityFile $work/key
    IdentitiesOnly yes
    GlobalKnownHostsFile $work/known_hosts
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
END
    ip link set lo up
    ip link add bridge type bridge
    ip link set bridge up
    for host in h1 h2; do
        mkdir "$work/$host"
        ssh-keygen -q -t ed25519 -N '' -f "$work/$host/key"
        echo "$host $(cat "$work/$host/key.pub")" >>"$work/known_hosts"
        echo "${address[$host]} $host" >>"$work/hosts"
        cat >"$work/$host/sshd_config" <<END
HostKey $work/$host/key
AuthorizedKeysFile $work/key.pub
StrictModes no
PermitRootLogin prohibit-password
PidFile none
SetEnv TMPDIR=$work/$host
END
    done
    for host in h1 h2; do
        unshare --net --uts --mount --ipc --pid --fork --kill-child --mount-proc \
            bash "$0" --host "$host" &
        local holder=$!
        # The file has no end of line, at which read fails.
        until read -r "pid[$host]" <"/proc/$holder/task/$holder/children" || [ -n "${pid[$host]}" ]; do
            sleep 0.1
        done
        ip link add "to-$host" type veth peer name eth0 netns "${pid[$host]}"
        ip link set "to-$host" master bridge up
    done
    for host in h1 h2; do
        for other in h1 h2; do
            local tries=0
            until on "$host" ssh "$other" true 2>"$work/ssh.log"; do
                [ $((tries += 1)) -lt 50 ] || fail "$host: ssh $other: $(cat "$work/ssh.log")"
                sleep 0.2
            done
        done
    done
}

# on HOST COMMAND...: runs a command there.
on() {
    local host=$1
    shift
    nsenter --target "${pid[$host]}" --mount --uts --ipc --net --pid -- \
        env -C "$root" TMPDIR="$work/$host" "$@"
}

# The processes of a host, other than those of its sshd, with their command lines.
processes() {
    on "$1" ps -eo pid=,comm=,args= | awk '$2 != "sshd" && $2 != "ps"'
}

# start NAME SECONDS ARGUMENTS...: `smorms3-dist run ARGUMENTS` on h1, for so many seconds at most.
start() {
    name=$1
    local limit=$2
    shift 2
    say "$name: smorms3-dist run $*"
    began=$SECONDS
    on h1 timeout -k 5 "$limit" python -m smorms3_dist run "$@" >"$work/$name.log" 2>&1 &
    job=$!
}

# finish STATUS: waits for it, and sees that it has ended like that; "failure" is any but 0 and those
# of a time limit.
finish() {
    local status=0
    wait "$job" || status=$?
    cat "$work/$name.log"
    echo "status $status after $((SECONDS - began)) s"
    case $1:$status in
    failure:0 | failure:124 | failure:137) fail "$name: status $status" ;;
    failure:*) ;;
    *) [ "$status" -eq "$1" ] || fail "$name: status $status, not $1" ;;
    esac
}

# shows REGEX: the output of the last job has a line like that.
shows() {
    grep -aEq -- "$1" "$work/$name.log" || fail "$name: no line like: $1"
}

# when_saved: waits until the job has saved a checkpoint; it must not end before.
when_saved() {
    until compgen -G "$work/$name/step-*" >/dev/null; do
        kill -0 "$job" 2>/dev/null || { finish 0 && fail "$name: ended before a checkpoint"; }
        sleep 0.1
    done
}

# cut_off LIMIT REGEX: cuts the link of h2, and waits for the line that says so.
cut_off() {
    ip link set to-h2 down
    local since=$SECONDS
    echo "the link of h2 is down"
    until grep -aEq -- "$2" "$work/$name.log"; do
        [ $((SECONDS - since)) -le "$1" ] || { cat "$work/$name.log" && fail "$name: not noticed"; }
        sleep 0.2
    done
    echo "noticed after $((SECONDS - since)) s"
}

# gone HOST SECONDS: within so long, no process of a job is left there.
gone() {
    local since=$SECONDS
    until [ -z "$(processes "$1")" ]; do
        [ $((SECONDS - since)) -lt "$2" ] || fail "$1: left behind: $(processes "$1")"
        sleep 0.5
    done
    echo "$1: no process left, $((SECONDS - since)) s later"
}

accuracy() { sed -En 's/.*validation accuracy: ([0-9.]+)%.*/\1/p' "$work/$name.log"; }

test_hosts() {
    local train=(examples/mnist/train_mnist.py --epoch 20 --out "$work/result")
    local both=(-H 'h1:2,h2:2')

    start both 120 "${both[@]}" --checkpoint-dir "$work/both" "${train[@]}"
    finish 0
    shows 'validation accuracy'
    local whole
    whole=$(accuracy)
    gone h1 5
    gone h2 5

    start restart 240 "${both[@]}" --checkpoint-dir "$work/restart" --max-restarts 2 --min-ranks 2 \
        "${train[@]}" --checkpoint "$work/restart"
    when_saved
    cut_off 20 '^smorms3-dist run: .*h2.*ranks 2 and 3'
    local since=$SECONDS
    finish 0
    shows 'restart 1 of 2 in 1 s, 2 ranks on h1, from step [0-9]+'
    shows 'going on from step [0-9]+ of '
    echo "accuracy $(accuracy) %, on both hosts $whole %"
    awk -v a="$(accuracy)" -v b="$whole" 'BEGIN { exit !(a > b - 2) }' || fail "$name: accuracy"
    gone h1 5
    # Agents that have lost their launcher wait for a minute.
    gone h2 $((65 - SECONDS + since > 5 ? 65 - SECONDS + since : 5))
    ip link set to-h2 up
    on h1 ssh -o ConnectTimeout=10 h2 true

    start no-restart 180 "${both[@]}" "${train[@]}" --checkpoint "$work/no-restart"
    when_saved
    since=$SECONDS
    cut_off 60 '^smorms3-dist run: .*h2.*ranks 2 and 3'
    finish failure
    [ $((SECONDS - since)) -le 60 ] || fail "$name: took $((SECONDS - since)) s"
    gone h1 5
    ip link set to-h2 up

    # As Docker makes it: the same address on both hosts, which leads nowhere. Ranks that try it hang.
    # And a network that both are in, but which does not connect them.
    for host in h1 h2; do
        on "$host" ip link add docker0 type bridge
        on "$host" ip address add 172.17.0.1/16 dev docker0
        on "$host" ip link set docker0 up
        on "$host" ip link add far0 type bridge
        on "$host" ip address add "10.78.0.${host#h}/24" dev far0
        on "$host" ip link set far0 up
    done
    start docker0 120 "${both[@]}" "${train[@]}"
    finish 0
    shows '^smorms3-dist run: ranks talk by eth0 of h1; eth0 of h2$'
    shows 'validation accuracy'
    start missing 60 "${both[@]}" --network-interface ib0 tests/programs/ranks.py lines
    finish 2
    shows 'has no network interface ib0; it has .*eth0'
    on h1 python -m smorms3_dist doctor -H h1,h2 >"$work/doctor.log" || true
    tail -n 2 "$work/doctor.log"
    grep -Eq '^green +h1, h2 .* h1 by eth0, h2 by eth0' "$work/doctor.log" || fail "doctor -H"
    for host in h1 h2; do
        on "$host" ip link delete docker0
        on "$host" ip link delete far0
    done

    start raise 60 "${both[@]}" tests/programs/ranks.py raise 3
    finish 1
    tail -n 1 "$work/$name.log" | grep -q 'rank 3 on h2 failed with exit status 1' ||
        fail "$name: the last line"
    tail -n 2 "$work/$name.log" | grep -q 'ValueError: the reason' || fail "$name: no traceback"
    gone h1 5

    start interrupt 120 "${both[@]}" "${train[@]}" --checkpoint "$work/interrupt"
    when_saved
    on h1 kill -INT "$(processes h1 | awk '/python -m smorms3_dist run/ && $2 != "timeout" { print $1 }')"
    finish 130
    gone h1 5
    gone h2 5

    start unknown 60 -H 'h1:2,nowhere:2' tests/programs/ranks.py environment
    finish failure
    shows '^smorms3-dist run: mpirun ended with .* before 4 of 4 ranks had started [(]nowhere[)]'
    gone h1 5

    # The bridge has no sshd.
    ip address add 10.77.0.8/24 dev bridge
    echo 10.77.0.8 h8 >>"$work/hosts"
    start refused 90 -H 'h1:2,h8:2' --max-restarts 1 --min-ranks 2 \
        tests/programs/ranks.py environment 1 SMORMS3_RESTART_COUNT
    finish 0
    shows '^smorms3-dist run: mpirun ended with .* before 4 of 4 ranks had started [(]h8[)]'
    shows '^\[1\] SMORMS3_RESTART_COUNT=1'
    gone h1 5

    # Nobody answers there.
    echo 10.77.0.9 h9 >>"$work/hosts"
    on h1 ip neighbour add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0
    start silent 60 -H 'h1:2,h9:2' --start-timeout 10 tests/programs/ranks.py environment
    finish 124
    shows '^smorms3-dist run: --start-timeout: 4 of 4 ranks .*[(]h9[)]'
    gone h1 5
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"
declare -A pid
case ${1:-} in
--host) be_host "$2" ;;
--inside)
    mount -t tmpfs tmpfs /run
    make_hosts
    test_hosts
    say "all is well"
    ;;
*)
    prepare
    # Mounts, a network and processes of its own: they are gone when it ends.
    setpriv --pdeathsig KILL unshare --mount --net --pid --fork --kill-child --mount-proc \
        bash "$0" --inside &
    inside=$!
    trap 'kill -KILL $inside; exit 130' INT TERM HUP
    wait "$inside"
    ;;
esac
