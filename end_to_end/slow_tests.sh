#!/usr/bin/env bash
# The tests marked slow, which ./scripts/test.sh leaves out.
set -uo pipefail
if "$(dirname -- "$0")/../scripts/test.sh" -m slow "$@"; then
  echo "PASS slow_tests.sh"
else
  echo "FAIL slow_tests.sh"
  exit 1
fi
