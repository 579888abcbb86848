"""Spikes, losses that are not numbers and hangs: runs go on without a person, and exactly.

Ten clean runs raise no alarm. Runs whose loss is spoilt by one batch in thirty skip or pass those,
and end within the noise of the clean ones; killed at random moments, one that goes back ends with
the same bits; every incident is replayed. A shard of noise is skipped. Runs that stand still say
where, end with 75 and go on.
"""

from __future__ import annotations

import json
import random
import statistics
import string
import sys
import tempfile
import time
from pathlib import Path

from end_to_end.forks import Forked
from end_to_end.runs import Process, Run, check, report
from maxtext.data import plays

FAULTS = Path(__file__).with_name("faults.py")
STEPS, CLEAN, KILLS = 240, 10, 4
SHARDS, PART = 16, 20_000  # of text, and the letters in each
KEYS = (
  f"steps={STEPS}",
  f"eval_interval={STEPS}",
  "eval_steps=-1",
  "eval_sample_length=0",
  "enable_tensorboard=false",
)
SAVES = ("checkpoint_period=7", "max_num_checkpoints_to_keep=-1")
SHORT = ("steps=28", "eval_interval=-1", "enable_tensorboard=false", *SAVES)  # to stand still in
SKIP = ("skip_step_on_spikes=true", "skip_step_interval=48", "log_period=1")
BACK = ("rollback_limit=100",)


def broken(parent: Path, name: str, fault: str, *keys: str) -> Run:
  return Run(parent, name, (*KEYS, *SAVES, *keys), (str(FAULTS), fault, "train"))


def eval_loss(run: Run) -> float:
  return [loss for _, name, loss in run.losses() if name == "eval/avg_loss"][-1]


def incidents(run: Run) -> list[Path]:
  return sorted((run.folder / "incidents").glob("*.json"))


def clean(parent: Path) -> list[float]:
  losses = []
  for seed in range(CLEAN):
    seeds = (f"init_weights_seed={seed}", f"data_shuffle_seed={seed}")
    run = Run(parent, f"clean{seed}", (*KEYS, *SKIP, "enable_checkpointing=false", *seeds))
    Forked(run).ends(0)
    check(not incidents(run), f"a false alarm: {incidents(run)}")
    losses.append(eval_loss(run))
    scores = [row["optim/grad_norm_zscore"] for row in run.metrics() if "learning/loss" in row]
    print(f"  clean run {seed}: eval loss {losses[-1]:.4f}, highest score {max(scores):.1f}")
  return losses


def recovered(run: Run, losses: list[float], verdict: str) -> None:
  """The run met incidents, dealt with them, and ended as a clean one does."""
  run.train()
  found = incidents(run)
  verdicts = {json.loads(path.read_text())["verdict"] for path in found}
  check(verdicts == {verdict}, f"{run.name}: {verdicts} of {len(found)} incidents")
  noise = max(3 * statistics.stdev(losses), max(losses) - min(losses))
  off = eval_loss(run) - statistics.mean(losses)
  print(
    f"  {run.name}: {len(found)} {verdict}, eval loss {off:+.4f}, noise {noise:.4f}", flush=True
  )
  check(off < noise, f"{run.name} ends with a worse loss than clean runs")


def replayed(run: Run, count: int) -> None:
  """The first incidents; of later ones the run may have gone back behind the checkpoints."""
  found = [(json.loads(path.read_text()), path) for path in incidents(run)]
  found.sort(key=lambda pair: (pair[0]["batch"]["count"], pair[0]["step"]))
  for _, path in found[:count]:
    again = Process([sys.executable, str(FAULTS), run.entry[1], "replay", str(path)])
    check("as recorded, bit by bit" in again.ends(0), again.output)


def killed(run: Run, whole: Run) -> None:
  """Killed at random moments, most of them within a step or two of going back."""
  moments = random.Random(1)
  for _ in range(KILLS):
    process = run.start()
    process.until(lambda process=process: "going back" in process.output)  # type: ignore[misc]
    time.sleep(moments.random() * 0.3)
    process.kill()
  output = run.train()
  check(run.hashes() == whole.hashes(), f"other bits than the run that was not killed:\n{output}")
  check(run.losses() == whole.losses(), "other losses than the run that was not killed")
  print(f"  {KILLS} kills of a run that goes back changed no bit", flush=True)


def poisoned(parent: Path, losses: list[float]) -> None:
  """A shard of noise among the plays, read in order: passed over, at no cost to the loss."""
  text = "".join(scene.text for scene in plays.read()[:200])
  parts = [text[at : at + PART] for at in range(0, SHARDS * PART, PART)]
  chance, found = random.Random(0), []
  for name, bad in (("pure", None), ("poisoned", SHARDS // 2)):
    folder = parent / f"{name}-shards"
    folder.mkdir()
    for number, part in enumerate(parts):
      if number == bad:
        part = "".join(chance.choices(string.printable, k=PART // 4))
      lines = (json.dumps({"text": part[at : at + 500]}) for at in range(0, len(part), 500))
      (folder / f"{number:02d}.jsonl").write_text("\n".join(lines) + "\n")
    held = parent / "pure-shards" / f"{SHARDS - 1:02d}.jsonl"
    files = (f"grain_train_files={folder}/*.jsonl", f"grain_eval_files={held}")
    keys = (*KEYS, *SKIP, *files, "dataset_type=grain", "enable_data_shuffling=false")
    run = Run(parent, name, (*keys, "enable_checkpointing=false"))
    Forked(run).ends(0)
    found.append(eval_loss(run))
    verdicts = [json.loads(path.read_text())["verdict"] for path in incidents(run)]
    check(set(verdicts) == ({"skipped"} if bad else set()), f"{name}: {verdicts}")
  off, noise = found[1] - found[0], max(losses) - min(losses)
  print(f"  a poisoned shard: {len(verdicts)} skipped, eval loss {off:+.4f}, noise {noise:.4f}")
  check(off < noise, "a poisoned shard leaves a worse loss than clean ones")


def stalled(parent: Path, fault: str, words: str) -> None:
  """A run that stands still is ended within the limit, with the words for where it does."""
  keys = (*SHORT, "watchdog_timeout_seconds=4", "watchdog_restart=true")
  process = Run(parent, f"slow-{fault}", keys, (str(FAULTS), fault, "train")).start()
  last = process.ends(75).splitlines()[-1]
  seconds = float(last.split(" takes ")[1].split(" s ")[0])
  check(words in last and "start again" in last and seconds < 30, last)
  stacks = Path(last.split("all threads: ")[1].split(";")[0]).read_text()
  check("in slowly" in stacks, stacks)
  print(f"  {last}", flush=True)
  run = Run(parent, f"slow-{fault}", SHORT)
  check("resuming" in run.train(), "begun anew")


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    parent = Path(folder)
    for fault, words in (
      ("data", "the wait for the batch of step 20"),
      ("step", "the computation of step 20"),
      ("save", "save after"),
    ):
      stalled(parent, fault, words)
    losses = clean(parent)
    recovered(broken(parent, "skips", "spike", *SKIP), losses, "skipped")
    skips = broken(parent, "skips-nan", "nan", *SKIP, "abort_on_nan_loss=false")
    recovered(skips, losses, "skipped")
    whole = broken(parent, "back", "nan", *BACK)
    recovered(whole, losses, "rolled back")
    killed(broken(parent, "back-killed", "nan", *BACK), whole)
    poisoned(parent, losses)
    replayed(skips, 2)
    replayed(whole, 2)


if __name__ == "__main__":
  report(main)
