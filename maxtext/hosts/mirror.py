"""The folder of a run in a bucket: kept on a disk here while the run trains, and copied there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from maxtext.bucket import Bucket, is_url
from maxtext.errors import CheckpointError, ConfigError
from maxtext.hosts.folder import held
from maxtext.hosts.group import before_end, first, is_first, number
from maxtext.log import log

LEASE = "lease.json"  # in the bucket: who trains the run
PERIOD = 15.0  # seconds from one copy of what has changed, and of the lease, to the next
EXPIRED = 3 * PERIOD  # seconds in which a lease was not renewed: its owner is gone
# Checkpoints have a way of their own; the others are for this disk alone.
_OTHERS = re.compile(r"\.lock|lease\.json|checkpoints/\d.*|.*\.writing")
Print = tuple[int, int, int]  # of a file: inode, modification in ns, size


class Lease:
  """That this process, and those with it, are the only ones to train a run."""

  def __init__(self, bucket: Bucket):
    self.bucket = bucket
    whose = {"host": socket.gethostname(), "process": os.getpid(), "processes": _processes()}
    self._owner = {"id": uuid.uuid4().hex, **whose}
    self._count = 0

  def take(self) -> None:
    """Raises ConfigError where another has it and goes on renewing it, OSError."""
    if self.bucket.create(LEASE, self._text()):
      return
    found, since, said = self.bucket.read(LEASE), time.monotonic(), False
    while not _dead(found) and time.monotonic() - since < EXPIRED:
      if not said:
        log.info(f"{self.bucket.url}: waiting up to {EXPIRED:.0f} s for who has trained it to end")
      said = True
      time.sleep(PERIOD / 5)
      try:
        now = self.bucket.read(LEASE)
      except FileNotFoundError:  # it has ended in order
        return self.take()
      if now != found:
        owner = json.loads(now)
        where = f"process {owner['process']} of {owner['host']}"
        problem = f"is being trained by {where} in {self.bucket.url}; name another"
        raise ConfigError("run_name", problem)
    self.bucket.write(LEASE, self._text())

  def renew(self) -> None:
    """Raises OSError, and CheckpointError where another has taken it."""
    self.check()
    self._count += 1
    self.bucket.write(LEASE, self._text())

  def check(self) -> None:
    """Raises CheckpointError where it is another's by now, OSError, also where there is none."""
    owner = json.loads(self.bucket.read(LEASE))
    if owner.get("id") != self._owner["id"]:
      raise CheckpointError(f"{self.bucket.url}: another process trains this run by now")

  def leave(self) -> None:
    with contextlib.suppress(CheckpointError):
      self.check()
      self.bucket.delete([LEASE])

  def _text(self) -> bytes:
    return json.dumps({**self._owner, "renewed": self._count}).encode()


class Mirror:
  """`folder`, here, and `bucket`, which is to have what is in it, but for checkpoints."""

  def __init__(self, bucket: Bucket, folder: Path):
    self.bucket, self.folder, self.lease = bucket, folder, Lease(bucket)
    self._there: dict[str, Print] = {}
    self._lock = threading.Lock()
    self._failing = False

  def pull(self) -> None:
    """Have in `folder` what the bucket has, and nothing else. Raises OSError."""
    if self.folder.exists():
      shutil.rmtree(self.folder)
    self.folder.mkdir(parents=True)
    names = [name for name in self.bucket.files() if not _OTHERS.fullmatch(name)]
    self.bucket.fetch(names, self.folder)
    self._there = {name: _print(self.folder / name) for name in names}

  def push(self) -> None:
    """Copy what has changed, and remove what is gone. Raises OSError."""
    with self._lock:
      while True:
        here = dict(self._files())
        changed = [name for name, found in here.items() if self._there.get(name) != found]
        try:
          self.bucket.put(changed, self.folder)
          break
        except FileNotFoundError:
          if all((self.folder / name).exists() for name in changed):
            raise  # it is the bucket that is gone, and no file that went meanwhile
      self.bucket.delete(gone := self._there.keys() - here.keys())
      self._there = {k: v for k, v in self._there.items() if k not in gone} | here

  def check(self) -> None:
    """Raises CheckpointError where another process trains the run by now, OSError."""
    self.lease.check()

  def try_push(self) -> None:
    """As `push`; what fails is said once, and the run goes on."""
    try:
      self.push()
    except OSError as error:
      if not self._failing:
        log.error(f"{self.bucket.url}: not copied there ({error.strerror}); the run goes on")
      self._failing = True
      return
    if self._failing:
      log.error(f"{self.bucket.url}: copied there again, nothing is missing")
    self._failing = False

  def _files(self) -> Iterator[tuple[str, Print]]:
    for parent, _, names in os.walk(self.folder):
      for path in (Path(parent) / name for name in names):
        name = path.relative_to(self.folder).as_posix()
        if not _OTHERS.fullmatch(name):
          with contextlib.suppress(FileNotFoundError):  # it went since
            yield name, _print(path)


@dataclasses.dataclass(frozen=True)
class Home:
  """Where a run is: a folder here, and what copies it to a bucket if it is to be in one."""

  folder: Path
  mirror: Mirror | None = None

  @property
  def place(self) -> str:
    """For people."""
    return self.mirror.bucket.url if self.mirror else str(self.folder)


@contextlib.contextmanager
def at_home(place: str, cache: str) -> Iterator[Home]:
  """The run at a path or a URL, whose files are below `cache` meanwhile; no other trains it.

  Raises ConfigError, CheckpointError.
  """
  if is_url(place):
    with mirrored(place, cache) as mirror:
      yield Home(mirror.folder, mirror)
  else:
    with held(Path(place)):
      yield Home(Path(place))


@contextlib.contextmanager
def mirrored(url: str, cache: str) -> Iterator[Mirror]:
  """The folder of the run at a URL, below `cache`; it is this run's alone while it trains.

  Raises ConfigError, CheckpointError.
  """
  key = hashlib.sha256(url.encode()).hexdigest()[:16]
  folder = Path(cache).expanduser() / key / f"process-{number()}" / url.rpartition("/")[2]

  def take() -> None:
    try:
      mirror.lease.take()
      mirror.pull()
    except OSError as error:
      place = error.filename or url
      problem = f"{place}: {error.strerror}; name a place that can be written"
      raise ConfigError("base_output_directory", problem) from None

  try:
    mirror = Mirror(Bucket(url), folder)
  except OSError as error:
    raise ConfigError("base_output_directory", f"{url}: {error.strerror}") from None
  first(take)
  if not is_first():
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
  ended = threading.Event()

  def keep_up() -> None:
    while not ended.wait(PERIOD):
      mirror.try_push()
      if is_first():
        with contextlib.suppress(OSError, CheckpointError):  # a save finds out, and says it
          mirror.lease.renew()

  thread = threading.Thread(target=keep_up, name="copy to the bucket", daemon=True)
  thread.start()
  try:
    with before_end(mirror.try_push):
      yield mirror
  finally:
    ended.set()
    thread.join()
    mirror.try_push()
    if is_first():
      with contextlib.suppress(OSError):
        mirror.lease.leave()


def _dead(lease: bytes) -> bool:
  """Whether a lease is of a process that would be seen from here, and is no more."""
  try:
    owner = json.loads(lease)
    seen = owner["processes"] == _processes() != ""
    return seen and not Path(f"/proc/{owner['process']}").exists()
  except (ValueError, KeyError, TypeError):
    return True


def _processes() -> str:
  """Which processes are seen from here: those of this machine, as long as it is up, and container;
  empty where the system does not say.
  """
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
  except OSError:
    return ""


def _print(path: Path) -> Print:
  stat = path.stat()
  return stat.st_ino, stat.st_mtime_ns, stat.st_size
