"""Several processes that train as one: how they begin, decide and end together."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from maxtext.errors import CheckpointError, ConfigError, ConfigErrors, Restart, UserError
from maxtext.hosts.places import Place
from maxtext.hosts.relay import Relay
from maxtext.hosts.sections import Hosts
from maxtext.hosts.service import Service
from maxtext.hosts.watch import FLUSHING, GRACE, HOSTS, NEWS, Watch

NEVER = 10**6  # seconds: what JAX does when a time is over is to abort; we are to be there first
TO_TELL = 60  # seconds for others to come and hear what is wrong with this process
AGREE, FIRST, BOARD, EACH = (f"maxtext/{kind}" for kind in ("agree", "first", "board", "each"))


class Elsewhere(UserError):
  """What ended process 0, in the others, with its exit code."""

  def __init__(self, line: str, exit_code: int):
    super().__init__(line)
    self.exit_code = exit_code


class Group:
  """This process's part in the group; all processes call its methods in the same order."""

  def __init__(self, place: Place, hosts: Hosts, error: UserError | None = None):
    """Waits for all others to come, with an `error` for less long, which then ends the process."""
    self.place, self._error = place, error
    self.timeout = hosts.jax_distributed_heartbeat_timeout_seconds
    self.watch = Watch(place, self.timeout)
    self._asked, self._said = 0, ""
    self._known: UserError | None = None
    seconds = hosts.jax_distributed_initialization_timeout
    self._service = self._join(seconds if error is None else min(seconds, TO_TELL))
    self.watch.start(self._service)
    self._service.write(f"{HOSTS}/{place.id}", socket.gethostname())
    while len(names := self._service.below(HOSTS)) < place.count:
      time.sleep(0.1)
    self.watch.names = names

  def first(self, decide: Callable[[], Any]) -> Any:
    """What `decide` returns in process 0, as JSON has it, or the UserError it raises: in each."""
    key = self._key(FIRST)
    if self.place.id:
      answer = json.loads(self._service.read(key))
      if "error" in answer:
        raise self._common(Elsewhere(f"process 0: {answer['error']}", answer["code"]))
      return answer["value"]
    try:
      value = decide()
    except UserError as error:
      self._service.write(key, json.dumps({"error": str(error), "code": error.exit_code}))
      self._common(error)
      raise
    self._service.write(key, json.dumps({"value": value}))
    return value

  def agree(self, values: Mapping[str, str]) -> None:
    """Raises ConfigErrors in every process, a line for each name that has not one value in all."""
    key, own = self._key(AGREE), dict(values)
    if self.place.id:
      theirs = json.loads(self._service.read(f"{key}/0"))
      names = [name for name in {**theirs, **own} if theirs.get(name) != own.get(name)]
      self._service.write(f"{key}/{self.place.id}", json.dumps({n: own.get(n) for n in names}))
    else:
      self._service.write(f"{key}/0", json.dumps(own))
      others = range(1, self.place.count)
      differing = {i: json.loads(self._service.read(f"{key}/{i}")) for i in others}
      self._service.write(f"{key}/verdict", json.dumps(_verdict(own, differing)))
    if lines := json.loads(self._service.read(f"{key}/verdict")):
      raise self._common(ConfigErrors(lines))

  def each(self, value: Any) -> list[Any]:
    """The values of all processes, as JSON has them, in each."""
    key = f"{self._key(EACH)}/{self.place.id}"
    self._service.write(key, json.dumps(value))
    folder = key.rpartition("/")[0]
    found = [json.loads(self._service.read(f"{folder}/{i}")) for i in range(self.place.count)]
    if self._said:  # of the call before: who is in this one has read it
      self._service.delete(self._said)
    self._said = key
    return found

  def board(self, name: str, text: str) -> dict[int, str]:
    """As `board`, without waiting for others. Raises RuntimeError where process 0 is gone."""
    self._service.write(f"{BOARD}/{name}/{self.place.id}", text)
    found = self._service.below(f"{BOARD}/{name}")
    return {int(process): said for process, said in found.items()}

  def fail(self, error: BaseException) -> None:
    """Tell the others what ends this process, unless it is what they have died of."""
    if _unclear(error):
      time.sleep(self.timeout + FLUSHING)  # if another has died, the watch ends this process
    code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    # what JAX does as a process ends may wait for computations that others have left
    end = threading.Timer(self.timeout + FLUSHING, os._exit, [code])
    end.daemon = True
    end.start()
    if error is not self._known:
      self.say_end(line, code)
    self.leave()

  def say_end(self, line: str, code: int) -> None:
    """Have the others end with this code, and say that this process did, with this line."""
    told = json.dumps({"line": line, "code": code})
    with contextlib.suppress(RuntimeError):
      self._service.write(f"{NEWS}/failed/{self.place.id}", told)

  def leave(self) -> None:
    """End the connection; process 0, which keeps it, when all others have."""
    import jax

    self.watch.leave()
    with contextlib.suppress(RuntimeError):
      self._service.write(f"{NEWS}/left/{self.place.id}", "")
      if not self.place.id:
        while len(self._service.missing()) < self.place.count - 1:
          pass
      jax.distributed.shutdown()

  def _join(self, seconds: int) -> Service:
    """Start JAX's client, and in process 0 its service. Raises ConfigError or Restart."""
    place, address = self.place, f"127.0.0.1:{self.place.port}"
    late: UserError = Restart(
      f"the {place.count} processes that {place.source} speaks of did not all come within "
      f"{seconds} s (jax_distributed_initialization_timeout); start all again"
    )
    if self._error is not None:
      late = Elsewhere(f"nobody came within {seconds} s to hear of it", self._error.exit_code)
    if place.id:
      relay = Relay(place.coordinator, self.watch.lost_coordinator)
      if not relay.start(seconds):
        raise late
      address = relay.address
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # as hardware.prepare, if it came so far
    import jax

    distributed = importlib.import_module("jax._src.distributed")
    # without it, the first death aborts all others
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    timer = threading.Timer(seconds, self.watch.end, [str(late), late.exit_code])
    timer.daemon = True
    timer.start()
    try:
      jax.distributed.initialize(
        coordinator_address=address,
        num_processes=place.count,
        process_id=place.id,
        local_device_ids=place.device,
        cluster_detection_method="deactivate",
        initialization_timeout=NEVER,
        heartbeat_timeout_seconds=self.timeout,
        shutdown_timeout_seconds=self.timeout,
      )
    except RuntimeError as error:
      what = str(error).splitlines()[0][:120]
      problem = f"process 0 cannot listen at port {place.port} ({what}); name a free one, there or "
      problem += "by JAX_COORDINATOR_PORT"
      raise ConfigError("jax_distributed_coordinator_address", problem) from None
    finally:
      timer.cancel()
    return Service(distributed.global_state.client, place.count)

  def _common(self, error: UserError) -> UserError:
    """An error that is raised in all processes, so that none has to be told of it."""
    self._known = error
    return error

  def _key(self, kind: str) -> str:
    """A key of its own for each call; the same in all processes, whose calls are the same."""
    self._asked += 1
    return f"{kind}/{self._asked}"


_group: Group | None = None


@contextlib.contextmanager
def joined(place: Place | None, hosts: Hosts) -> Iterator[None]:
  """Be one of several while inside; to be entered before JAX looks for devices. None: alone.

  What ends one process ends all, each with a line; where one dies, the others end with 75.
  """
  global _group
  if place is None:
    yield
    return
  _group = group = Group(place, hosts)
  try:
    yield
  except BaseException as error:
    group.fail(error)
    raise
  else:
    group.leave()
  finally:
    _group = None


def tell(place: Place, hosts: Hosts, error: UserError) -> None:
  """Tell the others of an error that keeps this process from joining them, and that ends them."""
  Group(place, hosts, error).fail(error)


def say_end(line: str, code: int) -> None:
  """Before this process ends at once: have the others end too, with this code and line."""
  if _group is not None:
    _group.say_end(line, code)
    if is_first():
      time.sleep(GRACE)  # who keeps the board must not be gone before it is read


def end(line: str, code: int) -> None:
  """End this process now, from whatever thread, with this line and code; and the others with it."""
  if _group is None:
    print(line, file=sys.stderr, flush=True)
    os._exit(code)
  telling = threading.Thread(target=_group.say_end, args=(line, code), daemon=True)
  telling.start()
  telling.join(FLUSHING)
  _group.watch.end(line, code)


def number() -> int:
  """Which process this is."""
  return 0 if _group is None else _group.place.id


def named(process: int) -> str:
  """A process in words."""
  return f"process {process}" if _group is None else _group.watch.name(process)


def alone() -> bool:
  """Whether this process trains without others."""
  return _group is None


def board(name: str, text: str) -> dict[int, str]:
  """What each process has last put on the board under this name, this one just now."""
  return {0: text} if _group is None else _group.board(name, text)


def is_first() -> bool:
  """Whether this process speaks for all: it is number 0, or alone."""
  return _group is None or _group.place.id == 0


def first(decide: Callable[[], Any]) -> Any:
  """`decide()` as process 0 finds it, in every process: JSON, or the UserError it raises."""
  return decide() if _group is None else _group.first(decide)


def agree(values: Mapping[str, str]) -> None:
  """Whether all processes have the same values. Raises ConfigErrors in each where they have not."""
  if _group is not None:
    _group.agree(values)


def each(value: Any) -> list[Any]:
  """`value`, which is JSON, of every process, in each."""
  return [value] if _group is None else _group.each(value)


def stop_at(name: str, finished: int) -> str:
  """The signal that ends the training after so many steps: `name`, or what came to another."""
  return name if _group is None else _group.watch.stop_at(name, finished)


@contextlib.contextmanager
def before_end(act: Callable[[], None]) -> Iterator[None]:
  """While inside: should the process be ended from a thread, `act` is done first."""
  acts = [] if _group is None else _group.watch.before_end
  acts.append(act)
  try:
    yield
  finally:
    acts.remove(act)


def _verdict(own: Mapping[str, str], differing: Mapping[int, dict[str, str | None]]) -> list[str]:
  """A line for each name: its value in process 0, and the others' with who has them."""
  lines = []
  for name in dict.fromkeys(name for values in differing.values() for name in values):
    who: dict[str | None, list[int]] = {}
    for process, values in differing.items():
      if name in values:
        who.setdefault(values[name], []).append(process)
    parts = [f"{own.get(name, 'nothing')} on process 0"]
    for value, (process, *more) in who.items():
      others = f" and {len(more)} more" if more else ""
      parts.append(f"{'nothing' if value is None else value} on process {process}{others}")
    lines.append(f"{name}: {', '.join(parts)}; give all processes the same")
  return lines


def _unclear(error: BaseException) -> bool:
  """Whether an error may come of another process's death: JAX or Orbax failed, and no file."""
  if isinstance(error, CheckpointError):
    cause, causes = error.__cause__, list[BaseException]()
    while cause is not None:
      causes.append(cause)
      cause = cause.__cause__
    return bool(causes) and not any(isinstance(cause, OSError) for cause in causes)
  return isinstance(error, Exception) and not isinstance(error, UserError)
