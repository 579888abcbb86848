"""What the Dockerfile does works: its commands run in a folder, and what they install trains.

No docker is needed: COPY copies what .dockerignore lets through, RUN runs, with / in that folder.
hadolint has nothing to say of the file, where it is installed.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from end_to_end.runs import OURS, Process, check, report

ROOT = Path(__file__).parents[1]
LARGEST = 1200  # MB of a CPU's image, beside Python


def stage() -> list[tuple[str, str]]:
  """(instruction, rest) of what stands between the first FROM and the second."""
  text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
  first = re.sub(r"\\\n", "", text).split("FROM ")[1].splitlines()[1:]
  return [(word, rest) for word, _, rest in (line.partition(" ") for line in first)]


def context() -> list[str]:
  """The files that .dockerignore lets through: of its lines the last that fits counts."""
  rules = (ROOT / ".dockerignore").read_text().splitlines()
  done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
  return [file for file in done.stdout.splitlines() if passes(file, rules)]


def passes(file: str, rules: list[str]) -> bool:
  verdict, steps = True, [file, *map(str, Path(file).parents)][:-1]
  for rule in rules:
    if any(fnmatch.fnmatchcase(step, rule.removeprefix("!")) for step in steps):
      verdict = rule.startswith("!")
  return verdict


def build(folder: Path, device: str) -> Process:
  """The first stage, in a folder, to its end or to the command that fails: the last process."""
  source = folder / "source"
  source.mkdir()
  for word, rest in stage():
    if word == "COPY":
      *names, target = rest.split()
      for file in context():
        if file in names or names == ["."]:
          place = source / target / (file if names == ["."] else Path(file).name)
          place.parent.mkdir(parents=True, exist_ok=True)
          shutil.copy(ROOT / file, place)
    elif word == "RUN":
      command = rest.replace("/opt/", f"{folder}/opt/")
      process = Process(["sh", "-c", command], {"device": device}, source)
      if process.wait(1800):
        break
  return process


def main() -> None:
  with tempfile.TemporaryDirectory() as parent:
    wrong, folder = Path(parent) / "wrong", Path(parent) / "cpu"
    wrong.mkdir()
    check("use cpu, cuda or tpu" in build(wrong, "gpu").ends(2), "gpu is taken for a device")
    folder.mkdir()
    build(folder, "cpu").ends(0)
    own = folder / "opt" / "maxtext" / "bin"
    size = sum(file.stat().st_size for file in own.parent.rglob("*") if file.is_file()) >> 20
    print(f"  {size} MB installed", flush=True)
    check(size < LARGEST, f"{size} MB are more than {LARGEST}")
    keys = ("steps=2", "eval_interval=-1", "run_name=r", "hardware=cpu", "base_emb_dim=32")
    run = [str(own / "python"), "-m", "train", *keys, f"base_output_directory={folder}"]
    output = Process(run, directory=folder).ends(0)
    check("finished 2 steps" in output, output)
    shown = subprocess.run([own / "tensorboard", "--version"], capture_output=True, env=OURS)
    check(shown.returncode == 0, f"tensorboard: {shown.stderr!r}")
    if hadolint := shutil.which("hadolint"):
      Process([hadolint, str(ROOT / "Dockerfile")]).ends(0)
      print("  hadolint has nothing to say")


if __name__ == "__main__":
  report(main)
