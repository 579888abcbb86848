"""Compile the recipes of configs/hardware for the devices that they name, and note what is seen.

  python scripts/hardware_table.py [RECIPE ...] [key=value ...]

Each is compiled by the TPU's compiler, of the extra `tpu`, without a TPU: one to five minutes of a
CPU each. Its row of the table in docs/hardware.md is written anew; with key=value nothing is
written, but the rows are printed: to compare another remat policy, batch or layout.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = ROOT / "configs/hardware"
PAGE = ROOT / "docs/hardware.md"
HEAD = "| recipe |"  # how the table begins


def main(argv: list[str]) -> int:
  """Compile and write; returns 1 where a recipe does not compile or does not fit."""
  keys = [word for word in argv if "=" in word]
  names = [word for word in argv if "=" not in word] or recipes()
  if unknown := set(names) - set(recipes()):
    sys.exit(f"{unknown.pop()!r} is none of {', '.join(recipes())}")
  failed = False
  for name in names:
    report = compiled(name, keys)
    failed |= not report["fits"]
    if report["problem"]:  # all that is known then
      print(f"{name}: {report['problem']}", flush=True)
      continue
    print(row(name, report), flush=True)
    if not keys:
      write(name, row(name, report))
  return int(failed)


def recipes() -> list[str]:
  return sorted(path.stem for path in RECIPES.glob("*.yml"))


def compiled(name: str, keys: list[str]) -> dict:
  """The report of the step that this recipe trains with."""
  with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place, "report.json")
    recipe = RECIPES / f"{name}.yml"
    words = ["dataset_type=synthetic", *keys, f"report_file={path}"]
    command = [sys.executable, "-m", "maxtext.compile", str(recipe), *words]
    environ = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=False)
    if not path.exists():
      sys.exit(done.returncode or 1)
    return json.loads(path.read_text())


def row(name: str, report: dict) -> str:
  """A line of the table."""
  run, memory, time, sent = (report[key] for key in ("run", "memory", "time", "sent"))
  peak, chip = memory["peak"] / 2**30, memory["chip"] / 2**30
  wire, beside = {}, 0
  for one in sent:
    wire[one["kind"]] = wire.get(one["kind"], 0) + one["wire"] / 2**30
    beside += one["wire"] * one["beside"] / one["size"] if one["size"] else 0
  total = sum(wire.values())
  seconds = sum(time[part] for part in ("cycles", "kernels", "exposed")) if time else None
  cells = (
    f"[{name}](../configs/hardware/{name}.yml)",
    " x ".join(f"{axis} {size}" for axis, size in run["mesh"].items()),
    f"{run['tokens']:,}",
    run["remat_policy"],
    f"{peak:.1f} of {chip:.0f} GiB{'' if report['fits'] else ': too much'}",
    f"{seconds:.2f} s" if seconds else "",
    f"{time['mfu']:.0%}" if time else "",
    ", ".join(f"{kind} {size:.1f}" for kind, size in wire.items() if size >= 0.05),
    f"{beside / 2**30 / total:.0%}" if total else "",
    f"{report['compile_cpu_seconds']:.0f} CPU s",
  )
  return f"| {' | '.join(cells)} |"


def write(name: str, line: str) -> None:
  """Put a recipe's line in its place in the table."""
  text = PAGE.read_text()
  begin = text.index(HEAD)
  end = text.index("\n\n", begin) if "\n\n" in text[begin:] else len(text)
  head, rule, *lines = text[begin:end].splitlines()
  kept = [old for old in lines if not old.startswith(f"| [{name}]")]
  table = "\n".join([head, rule, *sorted([*kept, line])])
  PAGE.write_text(text[:begin] + table + text[end:])


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
