"""Runs that are killed at random lose no checkpoint and no bit, and every end says why.

200 kills, drawn from a seed: SIGKILL at any time, some steps in or inside a save, SIGTERM, a full
disk, one that turns read-only, one that is unplugged, and with two processes the death of one;
over packings, mixtures, one and two processes, ways of saving, and buckets. Each run then ends with
the bits and losses of one that was left alone. Those of disks need root, to mount.
  python end_to_end/chaos.py [kills [seed]]
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from end_to_end.forks import Forked
from end_to_end.hosts import places
from end_to_end.runs import Failure, Process, Run, check, report

SMALL = (
  "base_emb_dim=16",
  "base_mlp_dim=32",
  "base_num_decoder_layers=1",
  "max_target_length=32",
  "per_device_batch_size=4",
  "enable_tensorboard=false",
  "jax_distributed_heartbeat_timeout_seconds=12",
)
PACKINGS = {
  "first_fit": ("grain_packing_type=first_fit",),
  "concat": ("grain_packing_type=concat_then_split",),
  "unpacked": ("packing=false",),
}
EVALUATED = 6  # steps from one evaluation to the next, where there are any
SAVING = {
  "evaluating": (
    "checkpoint_period=3",
    f"eval_interval={EVALUATED}",
    "eval_steps=4",
    "eval_sample_length=0",
  ),
  "copies": (
    "eval_interval=-1",
    "checkpoint_period=8",
    "enable_emergency_checkpoint=true",
    "local_checkpoint_period=2",
  ),
  "continuous": ("enable_continuous_checkpointing=true", "eval_interval=-1"),
}
HASTE = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
PER_KILL = 24  # steps that a run has more for each


@dataclasses.dataclass
class Life:
  """The processes of a run, from a start to an end."""

  run: Run
  processes: list[Process]

  @property
  def disk(self) -> Path:
    return self.run.parent

  @property
  def first(self) -> Process:
    return self.processes[0]

  def steps(self, count: int) -> None:
    """Wait until so many steps are done, or all is over."""
    self.first.until(lambda: self.first.steps_completed() >= count)

  def alive(self) -> bool:
    return all(process.popen.poll() is None for process in self.processes)

  def end(self, *codes: int) -> None:
    """Wait for the end; each process ends with one of the codes and, by itself, with a reason."""
    for process in self.processes:
      code = process.wait()
      check(code in codes, f"{process} ended with {code}, not {codes}:\n{process.tail()}")
      check("Traceback" not in process.output, process.output)


def kill_at_any_time(life: Life, chance: random.Random) -> None:
  seconds = time.monotonic() + chance.uniform(0.0, 8.0)
  life.first.until(lambda: time.monotonic() >= seconds or life.first.step() >= 0)
  _kill(life)


def kill_some_steps_in(life: Life, chance: random.Random) -> None:
  life.steps(chance.randint(1, 8))
  time.sleep(chance.uniform(0.0, 0.02))
  _kill(life)


def kill_in_a_save(life: Life, chance: random.Random) -> None:
  """Up to 60 ms after one or two new names stand in the checkpoints folder."""
  life.steps(1)
  seen, saves = life.run.checkpoints(), chance.randint(1, 2)
  life.first.until(lambda: len(life.run.checkpoints() - seen) >= saves)
  time.sleep(chance.uniform(0.0, 0.06))
  _kill(life)


def kill_in_an_evaluation(life: Life, chance: random.Random) -> None:
  """Of a step that is saved, too: the checkpoint owes none."""
  life.steps(chance.randint(1, 6))
  life.first.until(lambda: life.first.step() % EVALUATED == EVALUATED - 1)
  time.sleep(chance.uniform(0.0, 0.05))
  _kill(life)


def _kill(life: Life) -> None:
  """SIGKILL for all, at once."""
  for process in life.processes:
    process.send(signal.SIGKILL)
  life.end(-signal.SIGKILL)


def sigterm(life: Life, chance: random.Random) -> None:
  """To one of the processes, at its first words or some steps later: all save, and end well. Of
  two, not before they have met: the other would wait for one that has ended.
  """
  life.first.until(lambda: bool(life.first.lines))
  life.steps(chance.randint(min(len(life.processes) - 1, 1), 8))
  chance.choice(life.processes).send(signal.SIGTERM)
  life.end(0)
  _explained(life.first, r"the same command resumes it|finished")


def one_dies(life: Life, chance: random.Random) -> None:
  """SIGKILL for one of two: the other says so, and is to be started again."""
  life.steps(chance.randint(1, 8))
  victim, other = chance.sample(life.processes, 2)
  victim.send(signal.SIGKILL)
  check(victim.wait() == -signal.SIGKILL, victim.tail())
  life.end(75, -signal.SIGKILL)
  _explained(other, "has died or does not answer; start all again, and the run goes on")


def disk_full(life: Life, chance: random.Random) -> None:
  life.steps(chance.randint(1, 6))
  ballast = life.disk / "ballast"
  with contextlib.suppress(OSError), ballast.open("wb") as file:
    while True:
      file.write(bytes(1 << 16))
      file.flush()
  try:
    life.end(4)
  finally:
    ballast.unlink()
  _explained(life.first, f"{re.escape(str(life.disk))}.*: No space left on device")


def disk_read_only(life: Life, chance: random.Random) -> None:
  life.steps(chance.randint(1, 6))
  with mounted(life.disk, "--bind", "-o", "ro", str(life.disk)):
    life.end(4)
  _explained(life.first, f"{re.escape(str(life.disk))}.*: Read-only file system")


def disk_unplugged(life: Life, chance: random.Random) -> None:
  """Where the disk was there is an empty folder, that cannot be written."""
  life.steps(chance.randint(1, 6))
  with mounted(life.disk, "-t", "tmpfs", "-o", "ro,size=4k", "none"):
    life.end(4)
  gone = "Read-only file system|No such file|there is no such bucket"
  _explained(life.first, f"{re.escape(str(life.disk))}.*: ({gone})")


def _explained(process: Process, words: str) -> None:
  last = process.lines[-1] if process.lines else ""
  check(bool(re.search(words, last)), f"the last line says not {words!r}:\n{process.tail()}")


Kind = Callable[[Life, random.Random], None]
PROCESSES: tuple[Kind, ...] = (kill_at_any_time, kill_some_steps_in, kill_in_a_save, sigterm)
DISKS: tuple[Kind, ...] = (disk_full, disk_read_only, disk_unplugged)


@contextlib.contextmanager
def mounted(place: Path, *how: str) -> Iterator[None]:
  """Something mounted at a place, over what is there, for a while. Raises Failure."""
  done = subprocess.run(["mount", *how, str(place)], capture_output=True, text=True)
  check(done.returncode == 0, done.stderr)
  try:
    yield
  finally:
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def disk() -> Iterator[tuple[Path, bool]]:
  """A folder for runs, and whether it is a small file system of its own."""
  with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as mounts:
    try:
      mounts.enter_context(mounted(Path(name), "-t", "tmpfs", "-o", "size=64m", "none"))
      own = True
    except Failure:
      own = False
    yield Path(name), own


@dataclasses.dataclass
class Case:
  """A configuration: its name, its keys, in how many processes it runs, where those that are alone
  keep what they have compiled, and whether the run is in a bucket, each life having an empty cache.
  """

  name: str
  keys: tuple[str, ...]
  hosts: int
  cache: Path
  bucket: bool = False

  def start(self, run: Run) -> Life:
    variables = places(self.hosts) if self.hosts > 1 else [{}]
    ours = HASTE | {"JAX_COMPILATION_CACHE_DIR": str(self.cache)}
    keys = ["devices=1"]
    if self.bucket:
      keys.append(f"run_cache_dir={tempfile.mkdtemp(dir=self.cache.parent)}")
    return Life(run, [Forked(run, *keys, environment=ours | each) for each in variables])


def cases(documents: Path) -> list[Case]:
  """Packings x mixtures x processes; each with the next way of saving."""
  for name, words in (("a", "to be or not to be, "), ("b", "what light through yonder window ")):
    lines = [json.dumps({"text": words * (1 + i % 7)}) for i in range(400)]
    (documents / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
  mixed = f"grain_train_files={documents}/a.jsonl,0.7;{documents}/b.jsonl,0.3"
  mixture = ("dataset_type=grain", mixed, f"grain_eval_files={documents}/a.jsonl")
  every = itertools.product((1, 2), {"corpus": (), "mixture": mixture}.items(), PACKINGS.items())
  ways = itertools.cycle(SAVING.items())
  found = []
  for (hosts, data, packing), saving in zip(every, ways, strict=False):
    parts = (data, packing, saving)
    name = "-".join([*(part for part, _ in parts), f"by{hosts}"])
    found.append(
      Case(name, tuple(key for _, keys in parts for key in keys), hosts, documents / "xla")
    )
  for case in found[3], found[7]:
    name = case.name.replace("-by", "-bucket-by")
    found.append(dataclasses.replace(case, name=name, bucket=True))
  return found[::5] + [case for i, case in enumerate(found) if i % 5]  # a few show much of all


def kill_and_resume(
  case: Case, kills: int, chance: random.Random, only: Sequence[Kind] = ()
) -> collections.Counter[str]:
  """Kill a run of this case so often, in `only` these ways or all, then hold it to one that was
  left alone; the kinds. Without a disk of its own nothing is done to disks.
  """
  with disk() as (place, own), tempfile.TemporaryDirectory() as other:
    keys = (*SMALL, *case.keys, f"steps={PER_KILL * kills + 8}")
    if "enable_emergency_checkpoint=true" in keys:
      keys += (f"local_checkpoint_directory={other}",)
    whole, run = (Run(place, name, keys, bucket=case.bucket) for name in ("whole", "killed"))
    case.start(whole).end(0)
    kinds = [*PROCESSES, *DISKS, *([one_dies] if case.hosts > 1 else [])]
    kinds += [kill_in_an_evaluation] if "eval_steps=4" in keys else []
    kinds = [kind for kind in only or kinds if own or kind not in DISKS]
    next_kind = drawn(kinds, chance)
    done = collections.Counter[str]()
    committed, lost = 0, False
    while done.total() < kills:
      life = case.start(run)
      kind = next(next_kind)
      alive = life.alive()
      try:
        kind(life, chance)
      except Failure as failure:
        raise Failure(f"{case.name}, kill {done.total() + 1}, {kind.__name__}: {failure}") from None
      finally:
        for process in life.processes:
          process.kill()
      if "finished" in life.first.output or not alive:
        break
      done[kind.__name__] += 1
      lost |= "not written" in life.first.output or "not copied there" in life.first.output
      committed = kept(life, committed, case.hosts == 1)
    case.start(run).end(0)
    check(run.hashes() == whole.hashes(), f"{case.name}: parameters or optimizer differ")
    ours, theirs = run.losses(), whole.losses()
    if lost:  # on a disk without room metrics end before the run does
      theirs = [line for line in theirs if line in ours]
    check(ours == theirs, f"{case.name}: the loss lines differ")
    return done


def drawn(kinds: Sequence[Kind], chance: random.Random) -> Iterator[Kind]:
  """Kinds at random, without end, and each of them before one comes again."""
  while True:
    yield from chance.sample(kinds, len(kinds))


def kept(life: Life, committed: int, copies: bool) -> int:
  """Whether a life began where the last one's newest checkpoint was; the newest of now."""
  if went_on := re.search(r"resuming .* after (\d+) steps", life.first.output):
    check(int(went_on[1]) >= committed, f"{committed} steps were saved:\n{went_on[0]}")
  elif committed:
    check(life.first.step() < 0, f"{committed} steps were saved, and it began anew:\n{life.first}")
  for folder, step in re.findall(r"^saved (.*)/(\d+): ", life.first.output, re.MULTILINE):
    if copies or folder.endswith(str(life.run.folder / "checkpoints")):
      committed = max(committed, int(step))
  return committed


def main(kills: int, seed: int) -> None:
  chance = random.Random(seed)
  total = collections.Counter[str]()
  with tempfile.TemporaryDirectory() as documents:
    every = cases(Path(documents))[:kills]
    for i, case in enumerate(every):
      share = kills * (i + 1) // len(every) - kills * i // len(every)
      begun = time.monotonic()
      done = kill_and_resume(case, share, chance)
      total += done
      kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
      seconds = time.monotonic() - begun
      print(f"  {case.name}: {done.total()} ends, no bit differs ({kinds}; {seconds:.0f} s)")
  print(f"  {total.total()} in all: {dict(sorted(total.items()))}")


if __name__ == "__main__":
  report(main, *map(int, (sys.argv[1:] + ["200", "0"][len(sys.argv) - 1 :])))
