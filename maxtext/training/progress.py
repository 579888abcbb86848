"""How far the run is: on a terminal a bar with the step lines above it, in a pipe the lines."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Self

from maxtext.log import above, log
from maxtext.training.metrics import due, format_step
from maxtext.training.sections import Observe

if TYPE_CHECKING:
  from rich.console import Console, RenderableType

WINDOW = 50  # steps whose mean pace gives tokens/s and the time that is left


class Progress:
  """Shows steps `first_step` to `steps` of a run; a context that owns the foot of the terminal.

  `observe.progress_bar` auto draws the bar where standard output is a terminal that can move its
  cursor, `on` draws it anywhere. Processes above 0 show nothing. The bar's tokens/s are those of
  all `devices` together.
  """

  def __init__(
    self, observe: Observe, steps: int, first_step: int = 0, devices: int = 1, process: int = 0
  ):
    self._observe, self._steps, self._done, self._devices = observe, steps, first_step, devices
    self._shown = process == 0 and _wanted(observe.progress_bar)
    self._began = time.monotonic()
    self._finished: collections.deque[float] = collections.deque(maxlen=WINDOW + 1)
    self._seconds: collections.deque[float] = collections.deque(maxlen=WINDOW)
    self._numbers: dict[str, str] = {}
    self._doing, self._ended = "first step", False
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> Self:
    if self._shown:
      self._draw()
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Leave the terminal as it was."""
    self._ended, self._doing = True, "" if self._done >= self._steps else "stopped"
    self._stack.close()

  def step(self, step: int, scalars: Mapping[str, float]) -> None:
    """Step `step` is finished: print its line if one is due, and move the bar."""
    if not self._finished:
      self._doing = ""
    self._done = step + 1
    self._finished.append(time.monotonic())
    self._seconds.append(scalars["perf/step_time_seconds"])
    tokens = self._devices * scalars["perf/per_device_tokens"]
    rate = tokens * len(self._seconds) / sum(self._seconds)
    numbers = {"loss": f"loss {scalars['learning/loss']:.3f}", "rate": f"{_short(rate)} tokens/s"}
    if "perf/mfu" in scalars:
      numbers["mfu"] = f"MFU {scalars['perf/mfu']:.1%}"
    self._numbers = numbers
    if due(step, self._observe, self._steps):
      log.info(format_step(step, scalars))

  @contextlib.contextmanager
  def doing(self, what: str) -> Iterator[None]:
    """While inside, the bar says what goes on besides training, e.g. 'evaluating'."""
    before, self._doing = self._doing, what
    try:
      yield
    finally:
      self._doing = before

  def seconds_left(self) -> float | None:
    """At the mean pace of the last steps and what lay between; None before two are finished."""
    if len(self._finished) < 2:
      return None
    first, last = self._finished[0], self._finished[-1]
    pace = (last - first) / (len(self._finished) - 1)
    return max(pace * (self._steps - self._done) - (time.monotonic() - last), 0.0)

  def _draw(self) -> None:
    """Put the bar up; log lines and whatever else is printed appear above it."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=sys.stdout, force_terminal=True)
    live = Live(
      console=console,
      get_renderable=lambda: self._bar(console),
      refresh_per_second=4,
      redirect_stderr=sys.stderr.isatty(),
    )
    self._stack.enter_context(live)
    self._stack.enter_context(above(lambda line: console.print(Text(line), soft_wrap=True)))

  def _bar(self, console: Console) -> RenderableType:
    """One line that fits the terminal: what matters least is left out first."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    whole = max(self._steps, 1)
    fields = {"count": f"{self._done:,}/{self._steps:,}", "share": f"{self._done / whole:.0%}"}
    fields |= (
      self._numbers | {"time": self._time()} | ({"doing": self._doing} if self._doing else {})
    )
    for name in _DISPENSABLE:
      if _room(fields, console.width) < _SHORTEST:
        fields.pop(name, None)
    row: list[RenderableType] = [Text(text, _STYLES[name]) for name, text in fields.items()]
    if (room := _room(fields, console.width)) >= _SHORTEST:
      bar = ProgressBar(whole, self._done, min(room, _LONGEST))
      bar.complete_style, bar.finished_style = "cyan", "green"
      row.insert(1, bar)
    grid = Table.grid(padding=(0, len(_GAP), 0, 0))
    grid.add_row(*row)
    return grid

  def _time(self) -> str:
    """The time left; while that is unknown the time since the start, at the end what it took."""
    left, passed = self.seconds_left(), _clock(time.monotonic() - self._began)
    return passed if left is None or self._ended else f"{_clock(left)} left"


_GAP = "  "
_SHORTEST, _LONGEST = 8, 60  # of the bar itself, in columns
_DISPENSABLE = ("share", "mfu", "rate", "doing", "loss", "time")
_STYLES = {
  "count": "bold",
  "share": "dim",
  "loss": "bold",
  "rate": "",
  "mfu": "",
  "time": "cyan",
  "doing": "yellow",
}


def _room(fields: Mapping[str, str], width: int) -> int:
  """Columns left for the bar; the terminal's last one stays free, where some terminals wrap."""
  return width - 1 - sum(len(text) + len(_GAP) for text in fields.values())


def _clock(seconds: float) -> str:
  """3725.2 -> '1:02:05'; days where there are any: '2d 03:10:00'."""
  minutes, second = divmod(int(seconds), 60)
  hours, minute = divmod(minutes, 60)
  days, hour = divmod(hours, 24)
  return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def _short(number: float) -> str:
  """Three figures and a unit: 9481.5 -> '9.48k'."""
  for unit in ("", "k", "M", "G"):
    if abs(number) < 999.5 or unit == "G":
      break
    number /= 1000
  digits = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
  return f"{number:.{digits}f}{unit}"


def _wanted(progress_bar: str) -> bool:
  """Whether to draw; auto does where standard output is a terminal that can move its cursor."""
  if progress_bar != "auto":
    return progress_bar == "on"
  return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
