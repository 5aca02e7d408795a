#!/bin/bash
# Random faults on short trainings, by threads and by real ranks; see --help.
set -eu
# shellcheck source=launchers/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launchers/setup.sh"
cd "$root"
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTHONPATH=$root:tests/helpers python tests/faults/campaign.py "$@"
