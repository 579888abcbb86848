#!/usr/bin/env bash
# Trains the small model of configs/quickstart.yml, then lets it write. A second call goes on where
# the first one stopped, or only writes.
#
#   ./scripts/quickstart.sh [key=value ...]
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare tensorboard
"$venv/bin/python" -m train "$root/configs/quickstart.yml" "$@"
"$venv/bin/python" -m decode "$root/configs/quickstart.yml" "$@"
