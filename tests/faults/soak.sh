#!/bin/bash
# A long training of two ranks, killed and gone on with; see --help.
set -eu
# shellcheck source=launchers/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launchers/setup.sh"
cd "$root"
PYTHONPATH=$root:tests/helpers python tests/faults/soak.py "$@"
