#!/usr/bin/env bash
# Trains the small model of configs/quickstart.yml, then lets it write. A second call goes on where
# the first one stopped, or only writes.
#
#   ./scripts/quickstart.sh [key=value ...]
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

config=$root/configs/quickstart.yml
prepare tensorboard
"$venv/bin/python" -m train "$config" "$@"
"$venv/bin/python" -m decode "$config" "$@"
where='import sys, maxtext.config as c; print(c.load(sys.argv[1:]).run.base_output_directory)'
runs=$("$venv/bin/python" -c "$where" "$config" "$@")
printf '\nTensorBoard: %q --logdir %q\n' "$venv/bin/tensorboard" "$runs"
