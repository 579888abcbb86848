"""One logger: process 0 speaks, the others only of errors."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("maxtext")


def start(process: int = 0, debug: bool = False) -> None:
  """Send the log to standard output, bare lines; processes above 0 report errors only."""
  handler = logging.StreamHandler(sys.stdout)
  handler.setFormatter(logging.Formatter("%(message)s" if process == 0 else f"[{process}] %(message)s"))
  log.handlers[:] = [handler]
  log.propagate = False
  log.setLevel(logging.ERROR if process else logging.DEBUG if debug else logging.INFO)
