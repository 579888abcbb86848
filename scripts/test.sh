#!/usr/bin/env bash
# Runs the tests, from the top of the checkout: paths among the arguments start there.
#
#   [EXTRAS=tpu] ./scripts/test.sh [pytest argument ...]
#
# EXTRAS are further extras of the project, with commas between them: tests that need one which is
# not installed are skipped, and say so.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare "test${EXTRAS:+,$EXTRAS}"
cd -- "$root"
exec "$venv/bin/python" -m pytest "$@"
