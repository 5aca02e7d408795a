#!/bin/bash
# Runs launchers/slurm.sbatch on a real Slurm: munged, slurmctld and slurmd, with two nodes, started here.
#
#   bash tests/slurm/run.sh
#
# Jobs by srun and by mpirun, on one node and on both; one that is preempted, goes back into the queue and on from its
# checkpoint; one that is cancelled; ranks that fail; a Slurm without PMIx. Takes 3 minutes.
#
# Needs root, and Debian's apt-get where slurm-wlm, munge, libpmix-dev or iproute2 is missing (libpmix-dev has
# the name by which Slurm looks for PMIx). Where it cannot run it says so and ends with status 77. The
# daemons and all their files are in namespaces of their own, which end with this script, however it
# ends; on the machine nothing but the packages stays.
set -eu

say() { printf '\n==> %s\n' "$*"; }
skip() {
    echo "slurm/run.sh: skipped: $*"
    exit 77
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
if [ "${1:-}" != --inside ]; then
    [ "$(id -u)" -eq 0 ] || skip "it must run as root, for namespaces and the daemons"
    own=(unshare --mount --pid --fork --kill-child --mount-proc)
    "${own[@]}" --net --uts true 2>/dev/null || skip "there are no namespaces to be had"
    library=/usr/lib/$(uname -m)-linux-gnu
    missing=()
    for file in /usr/sbin/{slurmctld,slurmd}:slurm-wlm /usr/sbin/munged:munge /sbin/ip:iproute2 \
        "$library/libpmix.so:libpmix-dev"; do
        [ -e "${file%:*}" ] || missing+=("${file#*:}")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        command -v apt-get >/dev/null || skip "there is no ${missing[*]}, and no apt-get"
        say "installing ${missing[*]}"
        # The packages would start daemons: here these cannot reach the system's, and end at once.
        # shellcheck disable=SC2016  # the shell inside expands it
        "${own[@]}" bash -eu -c 'mount -t tmpfs tmpfs /run; apt-get update -qq
            DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "$@"' - \
            "${missing[@]}" >/dev/null || skip "apt-get cannot install ${missing[*]}"
    fi
    # shellcheck source=launchers/setup.sh
    . "$root/launchers/setup.sh"
    # In the background: bash runs a trap while it waits, not while a command runs in the foreground.
    "${own[@]}" --net --uts bash "$0" --inside &
    inside=$!
    trap 'kill -KILL "$inside"; exit 130' INT
    trap 'kill -KILL "$inside"; exit 143' TERM HUP
    status=0
    wait "$inside" || status=$?
    exit "$status"
fi

# A file system of its own for all that follows: it is gone with its last process.
mount -t tmpfs tmpfs /run
state=/run/slurm-test
mkdir -p "$state"/{spool-n1,spool-n2,tmp-n1,tmp-n2,save,jobs,pmix}
export SLURM_CONF=$state/slurm.conf TMPDIR=$state/tmp
mkdir "$TMPDIR"
ip link set lo up
ip link add slurm0 type veth peer slurm1
ip link set slurm1 up
ip link set slurm0 up
ip address add 10.78.0.1/24 dev slurm0
printf '127.0.0.1 localhost\n10.78.0.1 slurm\n' >"$state/hosts"
mount --bind "$state/hosts" /etc/hosts
hostname slurm
cd "$root"

fail() {
    echo "slurm/run.sh: FAILED: $*" >&2
    tail -n 20 "$state"/{munged,slurmctld,n1,n2}.log >&2 || :
    exit 1
}

# until_true SECONDS WHAT COMMAND...: waits until a command succeeds.
until_true() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    while ! "$@" >"$state/last" 2>&1; do
        if [ "$SECONDS" -ge "$end" ]; then
            cat "$state/last" "$state"/jobs/*.out >&2 || :
            fail "$what"
        fi
        sleep 0.2
    done
}

say "munged, slurmctld and slurmd"
head -c 128 /dev/urandom >"$state/munge.key"
chmod 600 "$state/munge.key"
munged --key-file="$state/munge.key" --socket="$state/munge.socket" --pid-file="$state/munged.pid" \
    --log-file="$state/munged.log" --seed-file="$state/munged.seed"
# cred_expire is also how long a job that was put back into the queue has to wait there. TmpFS is where
# PMIx has its files: in /tmp those of two nodes, or of an earlier run, would be in each other's way.
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=slurm
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=5
StateSaveLocation=$state/save
SlurmdSpoolDir=$state/spool-%n
TmpFS=$state/tmp-%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/%n.log
NodeName=n[1-2] NodeHostname=slurm Port=[6821-6822] CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=10 State=UP
CONF
slurmctld
slurmd -N n1
slurmd -N n2
idle() { sinfo --noheader --format="%T %D" | grep -qx "idle 2"; }
until_true 30 "the nodes are not ready" idle
sinfo --version

# submit NAME EPOCHS OPTIONS...: puts a training into the queue, with options for sbatch. Its number is
# in $job, what it prints in $out.
submit() {
    local name=$1 epochs=$2
    shift 2
    out=$state/jobs/$name.out
    checkpoints=$state/jobs/$name
    job=$(CHECKPOINTS=$checkpoints sbatch --parsable --output="$out" "$@" launchers/slurm.sbatch \
        -x TMPDIR examples/mnist/train_mnist.py --epoch "$epochs" --checkpoint "$checkpoints" \
        --out "$TMPDIR/$name")
}
job_is() { scontrol --oneliner show job "$job" | grep -q " $1 "; }
# ended STATE SECONDS: waits for the job's end, which must be in this state.
ended() {
    until_true "$2" "job $job has not ended within $2 s" \
        job_is 'JobState=\(COMPLETED\|FAILED\|CANCELLED\|TIMEOUT\|NODE_FAIL\)'
    job_is "JobState=$1" || { cat "$out" >&2 && fail "job $job is not $1"; }
    nothing_left
}
has() { grep -qE "$1" "$out" || { cat "$out" >&2 && fail "$out has no line like: $1"; }; }
none_runs() { ! pgrep --full 'smorms3|train_mnist|ranks\.py'; }
nothing_left() { until_true 10 "processes of the job are left" none_runs; }

for backend in slurm mpirun; do
    say "sbatch, --backend $backend"
    export BACKEND=$backend
    submit "$backend" 2
    ended COMPLETED 120
    cat "$out"
    has '^\[0\] validation accuracy: [89][0-9]'
    has 'optimizer state: 1,6[0-9]+,'

    say "sbatch --nodes=2, two ranks on each, --backend $backend"
    submit "nodes-$backend" 2 --nodes=2
    ended COMPLETED 180
    cat "$out"
    # A quarter of it.
    has 'optimizer state: 80[0-9],'
done

saved() { compgen -G "$checkpoints/step-*/manifest.json"; }
for backend in slurm mpirun; do
    say "a job that is preempted goes back into the queue, and on from its checkpoint; --backend $backend"
    export BACKEND=$backend
    submit "preempted-$backend" 12
    until_true 120 "there is no checkpoint" saved
    scancel --batch --signal=USR1 "$job"
    until_true 60 "the job is not in the queue again" job_is Restarts=1
    until_true 10 "processes of the job are left" none_runs
    ended COMPLETED 300
    cat "$out"
    has '^smorms3-dist run: SIGUSR1: the ranks are asked'
    has '^slurm.sbatch: a checkpoint is saved; job [0-9]+ goes back into the queue'
    has '^\[0\] smorms3_dist: going on from step [1-9][0-9]* of '
    has '^\[0\] validation accuracy: [89][0-9]'
done

say "a job that is cancelled ends, and stays away from the queue"
submit cancelled 1000
until_true 120 "there is no checkpoint" saved
scancel "$job"
ended CANCELLED 30
cat "$out"

# run STATUS ARGUMENTS...: smorms3-dist run in an allocation of two tasks; what it prints is in $out.
run() {
    local expected=$1 status=0
    shift
    out=$state/jobs/run.out
    timeout -k 5 120 salloc --quiet --ntasks=2 smorms3-dist run -x TMPDIR "$@" \
        >"$out" 2>&1 || status=$?
    cat "$out"
    [ "$status" = "$expected" ] || fail "the status is $status, not $expected"
    nothing_left
}

say "a rank that fails, twice"
run 1 --backend slurm --max-restarts 1 tests/programs/ranks.py raise
has '^smorms3-dist run: restart 1 of 1'
[[ $(tail -n 1 "$out") =~ "rank 1 on n1 failed with exit status 1" ]] || fail "the last line is another"
[ "$(grep -c '^\[1\] ValueError: the reason' "$out")" -ge 2 ] || fail "its traceback is not there twice"

say "srun without PMIx"
run 2 --backend slurm --mpi-args=--mpi=none tests/programs/ranks.py raise
has "every rank is a job of its own.*Slurm's --mpi"

say "a Slurm that has no PMIx"
mkdir "$state/plugins"
plugins=$(scontrol show config | sed -n 's/^PluginDir *= //p')
find "$plugins" -name '*.so' -not -name 'mpi_pmix*' -exec cp -t "$state/plugins" {} +
sed "\$a PluginDir=$state/plugins" "$SLURM_CONF" >"$state/without_pmix.conf"
out=$state/jobs/without_pmix.out
SLURM_CONF=$state/without_pmix.conf run 2 --backend slurm tests/programs/ranks.py environment 0
has 'no PMIx.*use --backend mpirun'
SLURM_CONF=$state/without_pmix.conf run 0 --backend auto tests/programs/ranks.py environment 0
has '^\[1\] end of rank 1'

say "all is well"
