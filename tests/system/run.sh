#!/bin/bash
# Runs the checks that need a whole machine, as root: they install packages by apt-get, make network
# namespaces, and take about fifteen minutes in all. Neither the tests nor CI need them.
#
#   bash tests/system/run.sh                       all of them
#   bash tests/system/run.sh two_hosts slurm       some of them
#
# minimal_debian.sh, which runs all tests twice, is not among them.
# A check that cannot run here says why, with status 77, and counts as skipped. Output is in .cache/system.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd "$here/../.." && pwd -P)
logs=$root/.cache/system
mkdir -p "$logs"

checks=("$@")
[ $# -gt 0 ] || checks=(two_hosts slurm manifests image install)
failed=0
for check in "${checks[@]}"; do
    script=$here/$check.sh
    [ "$check" != slurm ] || script=$root/tests/slurm/run.sh
    [ -f "$script" ] || { echo "$check: there is no such check" >&2 && exit 2; }
    start=$SECONDS
    # Each check has limits for what it starts; this one is for the check itself.
    timeout -k 30 1800 bash "$script" >"$logs/$check.log" 2>&1
    status=$?
    took="$((SECONDS - start)) s"
    case $status in
    0) echo "$check: passed in $took" ;;
    77) echo "$check: skipped: $(tail -n 1 "$logs/$check.log")" ;;
    *)
        echo "$check: FAILED with status $status after $took; the end of $logs/$check.log:"
        tail -n 30 "$logs/$check.log"
        failed=1
        ;;
    esac
done
exit "$failed"
