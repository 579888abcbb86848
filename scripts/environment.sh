# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv in the checkout, or brings it up to date.
#
# `prepare EXTRA[,EXTRA]` leaves the project (editable) and these extras in "$venv", in the exact
# versions of constraints.txt, and takes milliseconds when neither list changed. uv does the work
# where it is found, else venv and pip. PYTHON chooses the interpreter; PIP_* and UV_* mean what they
# always mean.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

prepare() {
  ! is_ready "$1" || return 0
  # Two scripts started together in a fresh clone take turns, where the system has a lock to offer.
  if command -v flock >/dev/null; then
    exec 9<"$root"
    flock 9
  fi
  if ! is_ready "$1"; then
    choose_python
    make_venv
    install_project "$1"
    stamp >"$venv/has-$1" || die "cannot write $venv"
  fi
  exec 9<&-
}

is_ready() {
  [[ -f $venv/has-$1 ]] && stamp | cmp -s - "$venv/has-$1" && is_usable
}

stamp() {
  cat -- "$root/pyproject.toml" "$root/constraints.txt"
}

# The environment was made here, its interpreter runs, and is the version that PYTHON asks for.
is_usable() {
  local have
  [[ -f $venv/made-at && $(<"$venv/made-at") == "$root" ]] || return 1
  have=$(version_of "$venv/bin/python") || return 1
  [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$have" ]]
}

version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

with_uv() {
  # uv does not read pip's settings: where only those name the index, pip it is.
  command -v uv >/dev/null &&
    [[ -z ${PIP_INDEX_URL:-}${PIP_NO_INDEX:-} || -n ${UV_INDEX_URL:-}${UV_DEFAULT_INDEX:-}${UV_NO_INDEX:-} ]]
}

# Sets `python` to $PYTHON, else to the first usual name that is a Python we test with.
choose_python() {
  local name version newer=''
  if [[ -n ${PYTHON:-} ]]; then
    version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON does not run; name Python 3.11, 3.12 or 3.13"
    case $version in
      3.1[1-9]) python=$PYTHON ;;
      *) die "PYTHON=$PYTHON is Python $version; name Python 3.11, 3.12 or 3.13" ;;
    esac
    return
  fi
  for name in python3 python3.13 python3.12 python3.11 python; do
    version=$(version_of "$name") || continue
    case $version in
      3.1[1-3]) python=$name && return ;;
      3.1[4-9]) newer=${newer:-$name} ;;
    esac
  done
  if with_uv; then
    python='>=3.11,<3.14' # uv knows more places, and can fetch one
  elif [[ -n $newer ]]; then
    python=$newer
    printf 'note: %s is newer than what maxtext is tested with (3.11 to 3.13)\n' "$("$newer" -V)" >&2
  else
    version=$(python3 -V 2>&1) || version='no python3'
    die "found $version, needs Python 3.11 or newer; install one, or name it: PYTHON=python3.11 $0"
  fi
}

# Keeps an environment that works, and replaces one that does not.
make_venv() {
  local free
  if is_usable && { with_uv || "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    return
  fi
  free=$(free_mb "$root")
  ((free >= 1500)) || die "$root has $free MB free, the environment needs 1500 MB: make room"
  if with_uv; then
    uv venv --quiet --clear --python "$python" "$venv" || die "uv could not make $venv, see above"
  else
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      die "$python cannot make virtual environments; install its venv package (python3-venv), or uv"
    "$python" -m venv --clear "$venv" || die "$python could not make $venv, see above"
  fi
  printf '%s\n' "$root" >"$venv/made-at"
}

install_project() {
  local place free tight='' quiet='' project="${root}[$1]" file pins=(--constraint "$root/constraints.txt")
  [[ -t 1 ]] || quiet=--quiet
  printf 'installing maxtext[%s] and what it needs into %s\n' "$1" "$venv"
  if with_uv; then
    # Naming our constraints would hide those of UV_CONSTRAINT: name both.
    for file in ${UV_CONSTRAINT:-}; do pins+=(--constraint "$file"); done
    uv pip install $quiet --python "$venv/bin/python" "${pins[@]}" --editable "$project" && return
  else
    "$venv/bin/python" -m pip install $quiet --no-user "${pins[@]}" --editable "$project" && return
  fi
  for place in "$venv" "${TMPDIR:-/tmp}" "$HOME"; do
    free=$(free_mb "$place")
    ((free >= 1000)) || tight+="; $place has $free MB free"
  done
  die "the installation failed, see above$tight"
}

free_mb() {
  df -Pk -- "$1" | awk 'NR == 2 { print int($4 / 1024) }'
}
