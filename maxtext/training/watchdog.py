"""A thread that notices when a run stands still, says where, and may end it to be started again."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Self

from maxtext import hosts
from maxtext.errors import Restart
from maxtext.log import log
from maxtext.training.phases import Phase, Phases
from maxtext.training.sections import Observe

FACTOR = 10  # times the longest of late is too long
UNKNOWN = 4  # times the shortest limit, for what has not been done before
LATER = 5.0  # seconds in which a process that others wait for is to be the first to say so
FOLDER = "stalls"  # in a run's folder
WATCHED = {
  "data": "the wait for the batch of step {}",
  "step": "the computation of step {}",
  "checkpoint": "training's wait to save after {} steps",
  "save": "the save after {} steps, in its thread,",
}


class Watchdog:
  """Watches the `phases` of the run in `folder`, and `saving`, a save under way, while entered.

  A phase of WATCHED may take FACTOR times the longest of its last ones, and
  `watchdog_timeout_seconds` at least.
  """

  def __init__(
    self, section: Observe, folder: Path, phases: Phases, saving: Callable[[], Phase | None]
  ):
    self.section, self.folder, self.phases, self._saving = section, folder, phases, saving
    self._over = threading.Event()
    self._main = threading.get_ident()
    self._told: dict[str, Phase] = {}
    self._save: Phase | None = None
    self._saves = [0.0]

  def __enter__(self) -> Self:
    if self.section.watchdog_timeout_seconds:
      threading.Thread(target=self._run, name="watchdog", daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._over.set()

  def limit(self, name: str) -> float:
    """The seconds that a phase may take now."""
    shortest = self.section.watchdog_timeout_seconds
    lately = self._saves[1:] if name == "save" else [*self.phases.lately[name]]
    later = LATER if name == "step" and not hosts.alone() else 0.0
    return later + (max(shortest, FACTOR * max(lately)) if lately else UNKNOWN * shortest)

  def _run(self) -> None:
    while not self._over.wait(min(1.0, self.section.watchdog_timeout_seconds / 10)):
      saving = self._saving()
      if self._save is not None and saving != self._save:
        self._saves.append(time.monotonic() - self._save.since)
      self._save = saving
      for phase in (self.phases.now, saving):
        if phase is not None and phase.name in WATCHED:
          self._look(phase)
      for name, phase in tuple(self._told.items()):
        if phase not in (self.phases.now, saving):
          log.warning(f"{self._words(phase)} has ended after {self._passed(phase):.0f} s")
          del self._told[name]

  def _look(self, phase: Phase) -> None:
    passed, limit = self._passed(phase), self.limit(phase.name)
    if passed <= limit or self._told.get(phase.name) == phase:
      return
    self._told[phase.name] = phase
    what = f"{self._words(phase)} takes {passed:.0f} s already, {limit:.0f} s are the limit"
    line = f"{what}; the main thread is {self._where()}; stacks of all threads: {self._dump(what)}"
    if self.section.watchdog_restart:
      hosts.end(f"{line}; start again, and the run goes on", Restart.exit_code)
    print(line, file=sys.stderr, flush=True)

  def _words(self, phase: Phase) -> str:
    words = WATCHED[phase.name].format(phase.step)
    if phase.name == "checkpoint" and self._save is not None:
      words += f", behind that after {self._save.step},"
    return words

  def _passed(self, phase: Phase) -> float:
    return time.monotonic() - phase.since

  def _where(self) -> str:
    """The place in the main thread's stack that is ours and closest to where it stands."""
    stack = traceback.extract_stack(sys._current_frames()[self._main])
    place = next((f for f in reversed(stack) if "maxtext" in Path(f.filename).parts), stack[-1])
    return f"at {Path(place.filename).name}:{place.lineno} in {place.name}"

  def _dump(self, what: str) -> str:
    """Write the stacks of all threads to a new file; returns where, or why not."""
    path = self.folder / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-process-{hosts.number()}.txt"
    try:
      path.parent.mkdir(exist_ok=True)
      with path.open("w") as file:
        names = {f"0x{thread.ident:016x}": thread.name for thread in threading.enumerate()}
        print(what, *(f"{ident} {name}" for ident, name in names.items()), sep="\n", file=file)
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
      return f"{path} cannot be written ({error.strerror})"
    return str(path)
