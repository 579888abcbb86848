"""Several processes on this machine, as hosts would be: they find each other, and end as one."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from maxtext.jobs.job import place

SIGNAL_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def environments(count: int) -> list[dict[str, str]]:
  """The variables of each of `count` processes; one alone has none."""
  if count == 1:
    return [{}]
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  return [place(address, count, str(number)) for number in range(count)]


def run(command: Sequence[str], own: Sequence[Mapping[str, str]]) -> int:
  """Run the command once for each of `own` variables, and pass on what they print and the signals
  that come; returns the exit code of the first that fails.
  """
  started: list[subprocess.Popen[str]] = []

  def pass_on(number: int, _frame: FrameType | None) -> None:
    for process in started:
      if process.poll() is None:
        process.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
  dying_with = _dying_with(os.getpid())
  for variables in own:
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      env={**os.environ, **variables},
      start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on once
      preexec_fn=dying_with,  # safe: there are no threads yet
    )
    started.append(process)
  codes: list[int] = []
  readers = []
  for i, process in enumerate(started):
    prefix = f"[{i}] " if len(own) > 1 else ""
    readers.append(threading.Thread(target=_follow, args=(process, prefix, codes)))
    readers[-1].start()
  for reader in readers:
    while reader.is_alive():  # a lock that is waited for without end keeps signals away
      reader.join(0.2)
  return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _dying_with(launcher: int) -> Callable[[], None] | None:
  """What has a child get SIGTERM when its launcher ends, by whatever; None where only Linux can."""
  if sys.platform != "linux":
    return None
  control = ctypes.CDLL(None).prctl

  def demand() -> None:
    control(SIGNAL_OF_PARENTS_DEATH, signal.SIGTERM)
    if os.getppid() != launcher:  # which has ended before
      os._exit(128 + signal.SIGTERM)

  return demand


def _follow(process: subprocess.Popen[str], prefix: str, codes: list[int]) -> None:
  """Print each of its lines after the prefix, and note its exit code."""
  assert process.stdout is not None
  for line in process.stdout:
    sys.stdout.write(prefix + line.removeprefix(prefix))  # which some begin with by themselves
    sys.stdout.flush()
  codes.append(process.wait())
