"""On every supported Python of this machine: install, train five steps, decode.

Each gets a clone and an environment of its own, and the JAX that constraints.txt has for it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from end_to_end.runs import Process, Skip, check, report

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
# Where pyenv and uv keep interpreters; a version is put in.
HOMES = (".pyenv/versions/{}.*/bin", ".local/share/uv/python/cpython-{}.*/bin")
TINY = ("run_name=five", "steps=5", "base_emb_dim=32", "base_mlp_dim=64", "eval_steps=1")


def pythons() -> dict[str, str]:
  """version -> interpreter: on the PATH, or in pyenv's or uv's folders."""
  found: dict[str, str] = {}
  for version in VERSIONS:
    name = f"python{version}"
    on_path = shutil.which(name)
    installed = [
      str(path / name) for home in HOMES for path in Path.home().glob(home.format(version))
    ]
    for python in [on_path, *installed] if on_path else installed:
      if runs(python):
        found.setdefault(version, python)
  return found


def runs(python: str) -> bool:
  """Whether it starts at all: a version manager puts names on the PATH that do not."""
  says = subprocess.run([python, "-c", "print('runs')"], capture_output=True, text=True)
  return says.stdout == "runs\n"


def works(version: str, python: str) -> None:
  with tempfile.TemporaryDirectory() as place:
    clone = Path(place) / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    quickstart = Process(
      [str(clone / "scripts/quickstart.sh"), *TINY],
      environment={"PYTHON": python},
      directory=Path(place),
    )
    output = quickstart.ends(0, patience=900)
    check("completed step: 4," in output, f"{version}: no fifth step:\n{quickstart.tail()}")
    inside = str(clone / ".venv/bin/python")
    ask = "import sys, jax; print('%d.%d' % sys.version_info[:2], jax.__version__)"
    says = subprocess.run([inside, "-c", ask], capture_output=True, text=True).stdout.split()
    check(says[0] == version, f"asked for Python {version}, got {says[0]}")
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "jax==" in line]
    check(any(f"jax=={says[1]} " in pin for pin in pins), f"jax {says[1]} is none of {pins}")
    print(f"  Python {version} ({python}): jax {says[1]}, trained and decoded", flush=True)


def main() -> None:
  found = pythons()
  if not found:
    raise Skip("no Python of " + ", ".join(VERSIONS))
  for version, python in found.items():
    works(version, python)
  missing = [version for version in VERSIONS if version not in found]
  if missing:
    print(f"  not on this machine: {', '.join(missing)}")


if __name__ == "__main__":
  report(main)
