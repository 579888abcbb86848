"""Several processes on one machine train as one, and end together when one of them dies.

Two processes of four devices have the losses of one of eight. One is killed: the other says which,
ends with 75, and both go on where their checkpoint is; so they do when one is stopped, or asked to
save by SIGTERM. Last the run moves to four processes of two devices, and to one of eight.
"""

from __future__ import annotations

import signal
import socket
import tempfile
import time
from pathlib import Path

from end_to_end.runs import Process, Run, check, report

TOLERANCE = 1e-5
STEPS = 24
KEYS = (
  "checkpoint_period=4",
  "per_device_batch_size=1",
  "dropout_rate=0",
  "learning_rate=1.0e-3",
  "eval_interval=12",
)
MINUTE = 60.0  # seconds in which the others are to end


def together(
  run: Run,
  count: int,
  *keys: str,
  own: tuple[tuple[str, ...], ...] = (),
  environments: tuple[dict[str, str], ...] = (),
) -> list[Process]:
  """The run in `count` processes, which find each other by JAX's variables; `own` are further keys
  of each, and `environments` its further variables.
  """
  started = []
  for number, place in enumerate(places(count)):
    environment = place | (environments[number] if environments else {})
    further = own[number] if own else ()
    started.append(run.start(*keys, *further, environment=environment))
  return started


def places(count: int) -> list[dict[str, str]]:
  """The variables that make processes the parts of one."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  common = {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": str(count),
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }
  return [common | {"JAX_PROCESS_ID": str(number)} for number in range(count)]


def devices(count: int) -> str:
  """The key that makes of `count` processes eight devices in all."""
  return f"devices={8 // count}"


def finish(run: Run, count: int, *keys: str) -> None:
  """Train to the end in `count` processes, of which the first alone speaks."""
  processes = together(run, count, devices(count), *keys)
  outputs = [process.ends(0) for process in processes]
  check("finished" in outputs[0], f"no word of the end:\n{processes[0].tail()}")
  check(not any(outputs[1:]), f"process 1 spoke:\n{processes[1].tail()}")


def lost(processes: list[Process], number: int, victim: int) -> tuple[str, float]:
  """Send signal `number` to one process of a run: another's words, and the seconds to the end."""
  count = len(processes)
  processes[0].reach(5)
  others = [process for process in processes if process is not processes[victim]]
  processes[victim].send(number)
  begun = time.monotonic()
  try:
    words = [process.ends(75, MINUTE).splitlines()[-1] for process in others]
  finally:
    for process in processes:
      process.kill()
  for process, line in zip(others, words, strict=True):
    check(f"process {victim} of {count} (on {socket.gethostname()}) has died" in line, line)
    check("Traceback" not in process.output and "***" not in process.output, process.output)
  return words[0], time.monotonic() - begun


def killed(run: Run) -> None:
  for victim in (1, 0):
    for number in (signal.SIGKILL, signal.SIGSTOP):
      line, seconds = lost(together(run, 2, devices(2)), number, victim)
      print(f"  {number.name} of process {victim}: the other ended with 75 in {seconds:.1f} s")
      print(f"    {line}", flush=True)


def saved_by_sigterm(run: Run, count: int, victim: int) -> None:
  """SIGTERM on one process saves and ends all with 0, at one step."""
  processes = together(run, count, devices(count))
  processes[0].reach(3)
  processes[victim].send(signal.SIGTERM)
  output = [process.ends(0) for process in processes][0]
  last = processes[0].step()
  check(f"stopped by SIGTERM after {last + 1}" in output, f"no word of it:\n{processes[0].tail()}")
  check(str(last + 1) in run.checkpoints(), f"after step {last}: saved {run.checkpoints()}")
  print(f"  SIGTERM on process {victim} of {count}: all saved after step {last}", flush=True)


def losses(run: Run) -> dict[tuple[int, str], float]:
  return {(step, name): loss for step, name, loss in run.losses() if name != "learning/grad_norm"}


def same(one: Run, other: Run) -> None:
  """Equal losses, at every step and evaluation."""
  a, b = losses(one), losses(other)
  check(list(a) == list(b), f"{one.name} and {other.name} have not the same lines: {a} {b}")
  check({step for step, _ in a} == set(range(STEPS)), f"steps {sorted({step for step, _ in a})}")
  worst = max(a, key=lambda at: abs(b[at] / a[at] - 1))
  off = abs(b[worst] / a[worst] - 1)
  print(f"  {other.name}: largest difference from {one.name} {off:.1e}, of {worst[1]}", flush=True)
  check(off <= TOLERANCE, f"{worst}: {b[worst]!r}, and {a[worst]!r} in one process")


def main() -> None:
  with tempfile.TemporaryDirectory() as parent:
    keys = (*KEYS, f"steps={STEPS}")
    runs = {name: Run(Path(parent), name, keys) for name in ("one", "two", "moved")}
    runs["one"].train("devices=8")
    finish(runs["two"], 2)
    same(runs["one"], runs["two"])
    killed(Run(Path(parent), "killed", (*KEYS, "steps=1000000")))
    saved_by_sigterm(runs["moved"], 2, 1)
    saved_by_sigterm(runs["moved"], 4, 0)
    runs["moved"].train("devices=8")
    same(runs["one"], runs["moved"])


if __name__ == "__main__":
  report(main)
