"""Runs of the real entry points, each in a process of its own, and what they leave on the disk."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

CONFIG = Path(__file__).with_name("tiny.yml")
PATIENCE = 300.0  # seconds for what takes ten on an idle machine
# Tests have eight devices; a run has the ones that it asks for.
OURS = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


class Failure(Exception):
  """What was claimed does not hold."""


class Skip(Exception):
  """This machine cannot show it."""


def check(holds: bool, claim: str) -> None:
  """Raise Failure unless the claim holds."""
  if not holds:
    raise Failure(claim)


class Process:
  """An entry point at work: its output is read as it comes, its group can be killed whole."""

  def __init__(
    self,
    command: list[str],
    environment: dict[str, str] | None = None,
    directory: Path | None = None,
  ):
    self.command = command
    self.lines: list[str] = []
    self._news = threading.Condition()
    self.popen = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=OURS | (environment or {}),
      cwd=directory,
      start_new_session=True,
    )
    self._reader = threading.Thread(target=self._read, args=(self.popen.stdout,), daemon=True)
    self._reader.start()

  def _read(self, lines: Iterable[str]) -> None:
    for line in lines:
      with self._news:
        self.lines.append(line.rstrip("\n"))
        self._news.notify_all()

  @property
  def output(self) -> str:
    return "\n".join(self.lines)

  def step(self) -> int:
    """The last step that the output calls completed, -1 before the first."""
    return next((step for line in reversed(self.lines) if (step := completed(line)) >= 0), -1)

  def steps_completed(self) -> int:
    """How many steps the output calls completed."""
    return sum(completed(line) >= 0 for line in self.lines)

  def until(self, holds: Callable[[], bool], patience: float = PATIENCE) -> bool:
    """Wait until `holds`, asked every 2 ms, or the process's end; says whether it held."""
    end = time.monotonic() + patience
    while not holds():
      if self.popen.poll() is not None:
        return False
      check(time.monotonic() < end, f"waited {patience:.0f} s for {self}:\n{self.tail()}")
      with self._news:
        self._news.wait(0.002)
    return True

  def reach(self, step: int) -> None:
    """Wait until this step is completed; Failure if the process ends before."""
    check(self.until(lambda: self.step() >= step), f"{self} ended early:\n{self.tail()}")

  def send(self, number: int) -> None:
    """Send a signal to the entry point itself, as a scheduler does."""
    if self.popen.poll() is None:
      self.popen.send_signal(number)

  def kill(self) -> None:
    """SIGKILL for it and all that it started."""
    if self.popen.poll() is None:
      os.killpg(self.popen.pid, signal.SIGKILL)
    self.wait()

  def wait(self, patience: float = PATIENCE) -> int:
    """The exit code, once all output is read."""
    try:
      code = self.popen.wait(patience)
    except subprocess.TimeoutExpired:
      os.killpg(self.popen.pid, signal.SIGKILL)
      raise Failure(f"{self} did not end within {patience:.0f} s:\n{self.tail()}") from None
    self._reader.join(10)
    return code

  def ends(self, code: int, patience: float = PATIENCE) -> str:
    """The output of a process that ends with this exit code; Failure if it ends with another."""
    got = self.wait(patience)
    check(got == code, f"{self} ended with {got}, not {code}:\n{self.tail()}")
    return self.output

  def tail(self, lines: int = 15) -> str:
    return "\n".join(f"  | {line}" for line in self.lines[-lines:])

  def __str__(self) -> str:
    words = " ".join(self.command[1:])
    return words if len(words) < 500 else f"{words[:60]} ..."


def module(name: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> Process:
  """`python -m name arguments`, with the Python that runs this."""
  return Process([sys.executable, "-m", name, *map(str, arguments)], environment)


def completed(line: str) -> int:
  """The step of a `completed step:` line, -1 for any other line."""
  if not line.startswith("completed step: "):
    return -1
  return int(line.removeprefix("completed step: ").partition(",")[0])


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of tiny.yml with further keys, in `parent`/`name`; `parent` has compiled programs too."""

  parent: Path
  name: str
  keys: tuple[str, ...] = ()
  entry: tuple[str, ...] = ("-m", "train")  # what Python is to run
  bucket: bool = False  # whether the run knows `parent` as a bucket

  @property
  def base(self) -> str:
    """Its base_output_directory."""
    return f"file://{self.parent}" if self.bucket else str(self.parent)

  @property
  def folder(self) -> Path:
    return self.parent / self.name

  def start(self, *keys: str, environment: dict[str, str] | None = None) -> Process:
    """Begin the run, or go on with it."""
    where = (f"base_output_directory={self.base}", f"jax_cache_dir={self.parent / 'xla'}")
    words = (f"run_name={self.name}", *where, *self.keys, *keys)
    return Process([sys.executable, *self.entry, str(CONFIG), *words], environment)

  def train(self, *keys: str) -> str:
    """Begin or go on, to the end; the output."""
    return self.start(*keys).ends(0)

  def checkpoints(self) -> set[str]:
    """The names in the run's checkpoints folder, whatever their state."""
    try:
      return set(os.listdir(self.folder / "checkpoints"))
    except FileNotFoundError:
      return set()

  def metrics(self) -> Iterator[dict[str, float]]:
    """The lines of metrics.jsonl."""
    with (self.folder / "metrics.jsonl").open() as file:
      for line in file:
        yield json.loads(line)

  def losses(self) -> list[tuple[int, str, float]]:
    """Every loss that the run wrote down, in order: step, name, value."""
    names = ("learning/loss", "learning/lm_loss", "learning/grad_norm", "eval/avg_loss")
    return [
      (int(line["step"]), name, line[name])
      for line in self.metrics()
      for name in names
      if name in line
    ]

  def hashes(self) -> str:
    """A line per array of the newest checkpoint, with its sha256, as `diff` would compare them."""
    inspect = [sys.executable, "-m", "maxtext.inspect", str(self.folder), "hash=true"]
    done = subprocess.run(inspect, capture_output=True, text=True, env=OURS)
    check(done.returncode == 0, f"inspecting {self.folder}: {done.stderr}")
    return done.stdout


def report(script: Callable[..., None], *arguments: object) -> NoReturn:
  """Run an end-to-end script; its last line says PASS, FAIL or SKIP, and the exit code agrees."""
  sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log is read as it grows
  start, code = time.monotonic(), 0
  try:
    script(*arguments)
    verdict, detail = "PASS", f"in {time.monotonic() - start:.0f} s"
  except Skip as reason:
    verdict, detail = "SKIP", str(reason)
  except Failure as failure:
    verdict, detail, code = "FAIL", str(failure), 1
  print(f"{verdict} {Path(sys.argv[0]).name}: {detail}")
  sys.exit(code)
