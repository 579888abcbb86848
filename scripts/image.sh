#!/usr/bin/env bash
# Builds the container image for cpu, cuda or tpu, and with --push sends it to its registry.
#
#   ./scripts/image.sh tpu registry.example/maxtext:v1 [--push] [docker build argument ...]
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

device=${1:-} tag=${2:-} push=''
[[ $device =~ ^(cpu|cuda|tpu)$ && -n $tag ]] || die "usage: $0 cpu|cuda|tpu TAG [--push] [argument ...]"
shift 2
if [[ ${1:-} == --push ]]; then
  push=yes
  shift
fi
command -v docker >/dev/null || die "docker is not there; install it, or build $root/Dockerfile elsewhere"
docker build --build-arg device="$device" --tag "$tag" "$@" "$root"
[[ -z $push ]] || docker push "$tag"
