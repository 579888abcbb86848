"""Asked to stop: finish the step, save, and end well; asked again, end at once."""

from __future__ import annotations

import signal
from types import FrameType

from maxtext.log import log


class Stop:
  """Listens for SIGTERM and Ctrl-C while it is entered; called, says whether one has come.

  The second signal of a kind finds the system's own handler and ends the process there and then.
  """

  def __init__(self) -> None:
    self.name = ""
    self._before: dict[int, object] = {}

  def __enter__(self) -> Stop:
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._asked)
    return self

  def __exit__(self, *_: object) -> None:
    for number, before in self._before.items():
      signal.signal(number, before)  # type: ignore[arg-type]

  def __call__(self) -> bool:
    return bool(self.name)

  def _asked(self, number: int, frame: FrameType | None) -> None:
    self.name = signal.Signals(number).name
    for each in (signal.SIGTERM, signal.SIGINT):
      signal.signal(each, signal.SIG_DFL)
    log.info(f"{self.name}: stopping after this step; once more ends the process at once")
