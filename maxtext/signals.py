"""Asked to stop: finish the step, save, and end well; asked again, end at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

from maxtext import hosts
from maxtext.log import log

ASKING = (signal.SIGTERM, signal.SIGINT)


class Early:
  """While it is entered, and until a Stop is, SIGTERM and Ctrl-C end the process at once, with
  `code`: nothing has been done that could be saved, and every file is written whole or not at all.

  Also where the main thread is in a compiler, and Python's own handlers wait: a thread is woken.
  """

  now: Early | None = None  # the one that is entered

  def __init__(self, code: int = 0):
    self.code = code

  def __enter__(self) -> Early:
    read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._woken = signal.set_wakeup_fd(self._write)
    self._before = {number: signal.signal(number, self._late) for number in ASKING}
    threading.Thread(target=self._watch, args=(read,), daemon=True).start()
    Early.now = self
    return self

  def __exit__(self, *_: object) -> None:
    self.over()
    for number, before in self._before.items():
      signal.signal(number, before)

  def over(self) -> None:
    """Leave the signals to others."""
    if Early.now is self:
      Early.now = None
      signal.set_wakeup_fd(self._woken)
      os.close(self._write)

  def _watch(self, read: int) -> None:
    while came := os.read(read, 64):  # until the other end is closed
      if Early.now is self and (name := next((n.name for n in ASKING if n in came), None)):
        said = f"stopped by {name} before the first step, with nothing to save"
        said += "; the same command resumes it"
        with contextlib.suppress(OSError):
          os.write(sys.stdout.fileno() if hosts.is_first() else 2, f"{said}\n".encode())
        hosts.say_end(said, self.code)
        os._exit(self.code)
    os.close(read)

  def _late(self, number: int, _frame: FrameType | None) -> None:
    """While it is entered the thread ends the process; afterwards the signal does."""
    if Early.now is not self:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)


class Stop:
  """Listens for SIGTERM and Ctrl-C while it is entered; called after a step, says whether one has
  come, to this process or to another that trains with it.

  The second signal of a kind finds the system's own handler and ends the process there and then.
  """

  def __init__(self) -> None:
    self.name = self.by = ""  # what came to this process; what ends the training
    self._before: dict[int, object] = {}

  def __enter__(self) -> Stop:
    for number in ASKING:
      self._before[number] = signal.signal(number, self._asked)
    if Early.now is not None:
      Early.now.over()
    return self

  def __exit__(self, *_: object) -> None:
    for number, before in self._before.items():
      signal.signal(number, before)  # type: ignore[arg-type]

  def __call__(self, finished: int) -> bool:
    """Whether to end after so many steps: the same in all processes, which all have to ask."""
    self.by = hosts.stop_at(self.name, finished)
    return bool(self.by)

  def _asked(self, number: int, frame: FrameType | None) -> None:
    self.name = signal.Signals(number).name
    for each in ASKING:
      signal.signal(each, signal.SIG_DFL)
    log.info(f"{self.name}: stopping after this step; once more ends the process at once")
