"""The metrics file: one JSON object a line, kept free of what a killed process wrote too much."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from maxtext.log import log


class MetricsFile:
  """Appends a line per step; after the start a failing disk costs lines, never the run.

  Opening it drops the lines of `run_name` from `first_step` on and mends an unfinished last line;
  `dropped` says how many lines went. Raises OSError when the file cannot be opened or mended.
  """

  def __init__(self, path: Path, run_name: str, first_step: int):
    self.path, self.run_name = path, run_name
    path.parent.mkdir(parents=True, exist_ok=True)
    self.dropped = _rewind(path, run_name, first_step)
    self._fd = _open(path)
    self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
    self._lost = 0

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Append one line: step, run_name, then the values; to the file of that name, where someone
    has removed or replaced this one.
    """
    row = {"step": step, "run_name": self.run_name} | {k: number(v) for k, v in values.items()}
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    try:
      if not os.fstat(self._fd).st_nlink:
        self._begin_anew(step)
      self._append(line)
    except OSError as error:
      if not self._lost:
        log.error(f"{self.path}: step {step} not written ({error.strerror}); the run goes on")
      self._lost += 1
      return
    if self._lost:
      log.error(f"{self.path}: written again from step {step} on, lines missing: {self._lost}")
      self._lost = 0

  def _begin_anew(self, step: int) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    new = _open(self.path)
    os.close(self._fd)
    self._fd = new
    what = "was removed or replaced; lines before this step are in that file only"
    log.error(f"{self.path}: step {step}: {what}")

  def _append(self, line: bytes) -> None:
    """All of the line or nothing of it."""
    end = os.fstat(self._fd).st_size
    try:
      rest = line
      while rest:
        rest = rest[os.write(self._fd, rest) :]
    except OSError:
      if self._regular:
        os.ftruncate(self._fd, end)
      raise

  def flush(self) -> None:
    """Return when the lines are on the disk."""
    if self._regular:
      try:
        os.fsync(self._fd)
      except OSError as error:
        log.error(f"{self.path}: cannot flush ({error.strerror}); the run goes on")

  def close(self) -> None:
    self.flush()
    os.close(self._fd)


def _open(path: Path) -> int:
  return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


def number(value: float) -> float | str:
  """A finite number; else the string 'NaN', 'Infinity' or '-Infinity', which float() reads too.

  JSON has no such numbers; these are the spellings of protobuf's JSON mapping.
  """
  value = float(value)
  if math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _rewind(path: Path, run_name: str, first_step: int) -> int:
  """Drop the lines of `run_name` from `first_step` on, in one atomic replacement; how many went.

  Lines of other runs, and what is no JSON, stay: the file may be shared.
  """
  if not path.is_file():
    return 0
  path = path.resolve()
  draft = path.with_name(f".{path.name}.draft")
  dropped, mended = 0, False
  with path.open("rb") as old, draft.open("wb") as new:
    for line in old:
      whole = line.endswith(b"\n")
      if _kept(line, whole, run_name, first_step):
        new.write(line if whole else line + b"\n")
      else:
        dropped += 1
      mended |= not whole
    new.flush()
    os.fsync(new.fileno())
  if dropped or mended:
    shutil.copymode(path, draft)
    os.replace(draft, path)
  else:
    draft.unlink()
  return dropped


def _kept(line: bytes, whole: bool, run_name: str, first_step: int) -> bool:
  """Whether a line stays: none of ours from `first_step` on does, and no unfinished one."""
  try:
    row = json.loads(line)
  except ValueError:
    return whole or not line.startswith(b'{"step"')
  ours = isinstance(row, dict) and row.get("run_name") == run_name
  return not (ours and isinstance(row.get("step"), int) and row["step"] >= first_step)
