"""The TPU's compiler takes the flash kernel, alone and around a split length, and the products of
experts, with their gradients.

No TPU is needed: libtpu compiles for a described topology. It is installed into an environment of
its own, since a process that finds it looks for a TPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from end_to_end.runs import Process, check, report

ROOT = Path(__file__).parents[1]
TESTS = (
  "tests/kernels/test_splash.py",
  "tests/layers/test_moe_tpu.py",
  "tests/test_offload.py",
  "tests/test_compile.py",
)


def main() -> None:
  with tempfile.TemporaryDirectory() as place:
    python = str(Path(place) / "bin/python")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    pins = ["--constraint", str(ROOT / "constraints.txt")]
    install = [python, "-m", "pip", "install", "--quiet", *pins, "-e", f"{ROOT}[tpu]", "pytest"]
    Process(install, directory=ROOT).ends(0, patience=900)
    run = [python, "-m", "pytest", "-rs", "-k", "for_a_tpu", *TESTS]
    output = Process(run, directory=ROOT).ends(0, patience=600)
    ran = "passed" in output and "skipped" not in output
    check(ran, f"not all of the tests did run:\n{output[-1000:]}")
    print("  v5e 2x2: forward and gradient of flash, of ulysses with flash, of ring,")
    print("  of experts, and of experts on several chips; a step whose optimizer hosts keep;")
    print("  and the report of a compiled step")


if __name__ == "__main__":
  report(main)
