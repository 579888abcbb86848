#!/usr/bin/env bash
# Runs the tests, from the top of the checkout: paths among the arguments start there.
#
#   ./scripts/test.sh [pytest argument ...]
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare test
cd -- "$root"
exec "$venv/bin/python" -m pytest "$@"
