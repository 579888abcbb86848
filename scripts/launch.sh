#!/usr/bin/env bash
# Checks a run for a machine, and starts it there: python -m maxtext.launch in the environment that
# this makes.
#
#   ./scripts/launch.sh CONFIG.yml launch_target=local|docker|gke|xpk [key=value ...] [--submit]
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare tensorboard
exec "$venv/bin/python" -m maxtext.launch "$@"
