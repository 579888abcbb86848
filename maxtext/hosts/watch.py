"""Threads that hear of the other processes, and end this one when there is nothing to wait for."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable

from maxtext.errors import Restart
from maxtext.hosts.places import Place
from maxtext.hosts.service import Service
from maxtext.log import log

EVERY = 0.5  # seconds between two looks at the board
GRACE = (
  2.0  # seconds for others to hear the same news: who is told first must not look like a death
)
FLUSHING = 10.0  # seconds for what is to be done before the end

NEWS, STOP, HOSTS = "maxtext/news", "maxtext/stop", "maxtext/hosts"


class Watch:
  """Hears who has died, who has failed and who asks to stop, while the main thread computes.

  A main thread that waits for a dead process is inside XLA, where no exception reaches it: the
  process is ended from here, after what `before_end` lists is done.
  """

  def __init__(self, place: Place, timeout: int):
    self.place, self.before_end = place, list[Callable[[], None]]()
    self._timeout = timeout
    self._service: Service | None = None
    self.names: dict[str, str] = {}  # of the hosts, by process
    self._leaving, self._ending = threading.Event(), threading.Lock()
    self._silent = 0  # looks at the board that brought no answer
    self._step = threading.Lock()
    self._finished, self._last, self._asked, self.stopped_by = -1, -1, "", ""

  def start(self, service: Service) -> None:
    self._service = service
    watches = [self._read_news, self._count_the_living]
    if self.place.id:
      watches.append(self._mind_the_silence)
    for watch in watches:
      threading.Thread(target=self._run, args=(watch,), name="hosts", daemon=True).start()

  def leave(self) -> None:
    """From now on others may end, and this process too."""
    self._leaving.set()

  def lost_coordinator(self) -> None:
    """The connection to process 0 broke; others, who may have died before it, are named first."""
    time.sleep(GRACE)
    if not self._leaving.is_set():
      self.end(*self._death(0))

  def end(self, line: str, code: int) -> None:
    """End this process now, with this line and exit code; of several calls the first counts."""
    self._ending.acquire()
    last = threading.Thread(target=lambda: [act() for act in self.before_end], daemon=True)
    last.start()
    last.join(FLUSHING)
    print(f"[{self.place.id}] {line}" if self.place.id else line, file=sys.stderr, flush=True)
    if not self.place.id:
      time.sleep(GRACE)
    os._exit(code)

  def stop_at(self, name: str, finished: int) -> str:
    """What asked to stop, once this many steps are finished; empty to go on.

    `name` is the signal that has come to this process, if any. All processes ask after each step,
    and all get the same answer for it.
    """
    with self._step:
      self._asked, self._finished = name, finished
      return self.stopped_by if self.stopped_by and finished >= self._last else ""

  def _run(self, watch: Callable[[Service], None]) -> None:
    """A watch until the end; that the board cannot be read is news of the one who keeps it."""
    assert self._service is not None
    try:
      watch(self._service)
    except RuntimeError:
      self.lost_coordinator()

  def _read_news(self, service: Service) -> None:
    told = False
    while not self._leaving.wait(EVERY):
      if self._asked and not told:
        service.write(f"{NEWS}/stop/{self.place.id}", self._asked)
        told = True
      stops = self._hear(service)[0]
      if stops and not self.stopped_by:
        self._agree_to_stop(service, *min(stops.items()))

  def _hear(self, service: Service) -> tuple[dict[int, str], set[int]]:
    """Who asks to stop, by which signal, and who has left; one who has failed ends this process."""
    news = [(*key.split("/"), text) for key, text in service.below(NEWS).items()]
    self._silent = 0
    for kind, process, text in news:
      if kind == "failed" and int(process) != self.place.id and not self._leaving.is_set():
        failure = json.loads(text)
        self.end(f"{self.name(int(process))} ended: {failure['line']}", failure["code"])
    said = lambda what: {int(process): text for kind, process, text in news if kind == what}
    return said("stop"), set(said("left"))

  def _agree_to_stop(self, service: Service, process: int, name: str) -> None:
    """Find the first step that no process has finished yet; until then none begins another."""
    if process != self.place.id:
      log.info(f"{name} on {self.name(process)}: stopping after this step")
    with self._step:
      service.write(f"{STOP}/{self.place.id}", str(self._finished))
      finished: dict[str, str] = {}
      left: set[int] = set()
      while len(left | {*map(int, finished)}) < self.place.count:
        if self._leaving.wait(EVERY / 5):
          return
        finished, left = service.below(STOP), self._hear(service)[1]
      self._last, self.stopped_by = max(map(int, finished.values())) + 1, name

  def _count_the_living(self, service: Service) -> None:
    while not self._leaving.is_set():
      missing = service.missing()
      left = self._hear(service)[1] if missing else set()  # who has failed ends this process
      dead = [process for process in missing if process not in left]
      if dead and not self._leaving.is_set():
        self.end(*self._death(dead[0], len(dead) - 1))
      self._leaving.wait(2 * EVERY)

  def _mind_the_silence(self, service: Service) -> None:
    """Notice a coordinator that is stopped before JAX's client does, which would abort."""
    while not self._leaving.wait(EVERY):
      self._silent += 1
      if self._silent * EVERY > self._timeout / 2 and not self._leaving.is_set():
        self.end(*self._death(0))

  def _death(self, process: int, more: int = 0) -> tuple[str, int]:
    others = f", and {more} more," if more else ""
    line = f"{self.name(process)}{others} has died or does not answer"
    return f"{line}; start all again, and the run goes on", Restart.exit_code

  def name(self, process: int) -> str:
    """A process in words."""
    host = self.names.get(str(process))
    return f"process {process} of {self.place.count}" + (f" (on {host})" if host else "")
