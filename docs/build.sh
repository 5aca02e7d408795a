#!/bin/bash
# Does all the set-up, then makes HTML of docs/ in .cache/docs/html. A broken link or reference, and any
# other warning, is an error. Needs no network once the set-up is done.
#
#   bash docs/build.sh [SPHINX ARGUMENTS]
set -eu
# shellcheck source=launchers/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launchers/setup.sh"
cd "$root"

# From scratch: a page that is read from a cache is not checked again.
python -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet --builder html \
    --doctree-dir "$cache/docs/doctrees" "$@" docs "$cache/docs/html"
printf 'docs: %s\n' "$cache/docs/html/index.html"
