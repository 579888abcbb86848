"""Measure our train step: against the hand-written one, from a cold start, and on a virtual mesh.

  python scripts/benchmark_step.py [step] [memory] [start] [mesh] [guard] [--remat POLICY ...]
                                   [--rounds 5]

  step     interleaved with both styles of scripts/baseline_step.py, for every remat policy: ratios
           of times (medians over rounds), and of memory as XLA plans it
  memory   peak resident memory of a process that trains a few steps, ours and theirs
  start    seconds from the start of `python -m maxtext.train` to its first finished step, with the
           compilation cache empty and then full, beside the same of the hand-written step
  mesh     8 virtual devices, fsdp 4 x tensor 2, against one, interleaved in one process
  guard    training that skips spikes, against training that looks at none, interleaved; of this
           model and of a small one

The model is that of baseline_step.Size, in float32. On a busy machine trust CPU seconds and ratios.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

SIZE = (
  "dtype=float32 base_emb_dim=512 base_num_decoder_layers=8 base_num_query_heads=8 "
  "base_num_kv_heads=4 base_mlp_dim=1536 vocab_size=32000 max_target_length=512"
).split()
ROWS = 4
STYLE_REMAT = {"none": "none", "minimal_with_context": "saved", "full": "full"}
MESH = ("ici_fsdp_parallelism=4", "ici_tensor_parallelism=2")
RUN = (
  "dataset_type=synthetic steps=1 enable_checkpointing=false enable_tensorboard=false "
  f"per_device_batch_size={ROWS}"
).split()
SMALL = (
  "dtype=float32 base_emb_dim=128 base_num_decoder_layers=4 base_num_query_heads=4 "
  "base_num_kv_heads=2 base_mlp_dim=384 vocab_size=4096 max_target_length=128"
).split()
GUARDS = {"without": (), "with": ("skip_step_on_spikes=true",), "again": ()}
DEVICES = "--xla_force_host_platform_device_count="


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("parts", nargs="*", help="step, memory, start, mesh, guard; default all")
  parser.add_argument("--remat", nargs="+", choices=STYLE_REMAT, default=list(STYLE_REMAT))
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--alone", help=argparse.SUPPRESS)  # one contestant, for its peak memory
  options = parser.parse_args()
  measures = {"step": compare, "memory": weigh, "start": start, "mesh": spread}
  measures |= {"guard": guard}
  if unknown := set(options.parts) - set(measures):
    parser.error(f"{unknown.pop()!r} is none of {', '.join(measures)}")
  os.environ["JAX_PLATFORMS"] = "cpu"
  if options.alone:
    print(peak_alone(*options.alone.split(":")))
    return
  for name in options.parts or measures:
    if options.parts == [name]:
      measures[name](options)
    else:  # each in a process of its own: device counts and peaks stay apart
      flags = ["--remat", *options.remat, "--rounds", str(options.rounds)]
      subprocess.run([sys.executable, __file__, name, *flags], check=True)


def ours(policy: str, devices: int = 1, keys: Sequence[str] = ()) -> tuple[Callable, object]:
  """A function that runs our step once, and the compiled step."""
  import jax

  from maxtext import config, program

  rows = f"per_device_batch_size={ROWS / devices}"
  loaded = config.load([*SIZE, f"remat_policy={policy}", rows, *keys], {})
  built = program.build(loaded, jax.devices()[:devices])
  shapes = built.batch(ROWS)
  compiled = built.step.lower(built.state, shapes).compile()
  batch = {
    name: jax.device_put(_column(name, shape.shape, loaded.architecture.vocab_size), shape.sharding)
    for name, shape in shapes.items()
  }
  carried = [built.init()]

  def lap() -> float:
    carried[0], metrics = compiled(carried[0], batch)
    return float(metrics["loss"])

  return lap, compiled


def _column(name: str, shape: tuple[int, ...], vocabulary: int):
  """One column of a batch of random tokens, a document a row."""
  import numpy as np

  if name.endswith("segmentation"):
    return np.ones(shape, np.int32)
  if name.endswith("position"):
    return np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  ids = np.random.default_rng(0).integers(0, vocabulary, (shape[0], shape[1] + 1), np.int32)
  return ids[:, 1:] if name == "targets" else ids[:, :-1]


def theirs(style: str, policy: str) -> tuple[Callable, object]:
  """The same of the hand-written step."""
  import dataclasses

  import baseline_step
  import jax

  size = baseline_step.Size()
  chosen = dataclasses.replace(baseline_step.STYLES[style], remat=STYLE_REMAT[policy])
  compiled, batch = baseline_step.compile_step(chosen, size), baseline_step.make_batch(size)
  carried = [jax.jit(baseline_step.init_state, static_argnums=1)(jax.random.key(0), size)]

  def lap() -> float:
    carried[0], value = compiled(carried[0], *batch)
    return float(value)

  return lap, compiled


def compare(options: argparse.Namespace) -> None:
  """Print how our step compares with the hand-written ones."""
  import baseline_step
  from race import race

  print("step: ours / plain / tuned, seconds (wall and CPU, the best of all rounds), MiB")
  for policy in options.remat:
    made = {
      "ours": ours(policy),
      **{style: theirs(style, policy) for style in baseline_step.STYLES},
    }
    laps = race({name: lap for name, (lap, _) in made.items()}, options.rounds)
    memory = {name: planned(compiled) for name, (_, compiled) in made.items()}
    for name, its in laps.items():
      speed = baseline_step.products(baseline_step.Size()) / min(its.cpu) / 1e9
      line = (
        f"  {policy:>20} {name:>6} {min(its.wall):6.2f} s {min(its.cpu):6.2f} CPU s"
        f" {speed:4.0f} GFLOP per CPU s {memory[name]:6.0f} MiB"
      )
      if name != "ours":
        us = laps["ours"]
        line += (
          f"   ours is {us.over(its, 'wall'):.3f} in wall, {us.over(its, 'cpu'):.3f} in CPU time,"
          f" {memory['ours'] / memory[name]:.3f} in memory"
        )
      print(line, flush=True)


def planned(compiled) -> float:
  """MiB that XLA plans for: arguments (results take their place) and what stands beside them."""
  memory = compiled.memory_analysis()
  extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return (memory.argument_size_in_bytes + memory.temp_size_in_bytes + extra) / 2**20


def weigh(options: argparse.Namespace) -> None:
  """Print the peak resident memory of processes that train a few steps."""
  print("memory: peak resident MiB of a process that trains three steps")
  for policy in options.remat:
    peaks = {}
    for name in ("ours", "plain", "tuned"):
      command = [sys.executable, __file__, "--alone", f"{name}:{policy}"]
      done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
      peaks[name] = float(done.stdout.split()[-1])
    shown = ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items())
    against = ", ".join(f"{peaks['ours'] / peaks[name]:.3f} of {name}" for name in list(peaks)[1:])
    print(f"  {policy:>20}  {shown}   ours is {against}", flush=True)


def peak_alone(name: str, policy: str) -> float:
  """MiB that this process needs at most when it trains with one contestant."""
  lap, _ = ours(policy) if name == "ours" else theirs(name, policy)
  for number in range(3):
    print(f"completed step: {number}, loss {lap():.3f}", flush=True)
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start(options: argparse.Namespace) -> None:
  """Print the time to the first finished step, without and with a warm compilation cache, beside
  that of the hand-written one.
  """
  print(
    "start: seconds from process start to the first finished step, and of the step by hand (tuned)"
  )
  with tempfile.TemporaryDirectory() as folder:
    cache = str(pathlib.Path(folder, "cache"))
    by_hand = [sys.executable, __file__, "--alone", "tuned:minimal_with_context"]
    for number, state in enumerate(("cold", "warm", "warm", "warm")):
      keys = [f"base_output_directory={folder}", f"run_name=start{number}"]
      keys.append(f"jax_cache_dir={cache}")
      ours = first_step([sys.executable, "-m", "maxtext.train", *SIZE, *RUN, *keys], {})
      hand = first_step(by_hand, {"JAX_COMPILATION_CACHE_DIR": cache})
      print(f"  {state}: {ours:.1f} s, by hand {hand:.1f} s: {ours / hand:.2f}", flush=True)


def first_step(command: list[str], variables: dict[str, str]) -> float:
  """Seconds until `command` prints its first finished step."""
  begun, found, lines = time.perf_counter(), None, []
  kept = {name: at for name, at in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=kept | variables
  ) as run:
    for line in run.stdout:
      lines.append(line)
      if found is None and line.startswith("completed step:"):
        found = time.perf_counter() - begun
  if found is None or run.returncode:
    sys.exit("".join(lines) + f"the run ended with exit code {run.returncode}")
  return found


def spread(options: argparse.Namespace) -> None:
  """Print how the step on eight virtual devices compares with one device."""
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}8"
  from race import race

  print("mesh: 8 virtual devices, fsdp 4 x tensor 2, against one")
  for policy in options.remat:
    one, eight = ours(policy)[0], ours(policy, 8, MESH)[0]
    if abs(one() - eight()) > 1e-4:
      sys.exit("the two do not compute the same loss")
    laps = race({"one": one, "eight": eight}, options.rounds)
    ratios = [laps["eight"].over(laps["one"], kind) for kind in ("wall", "cpu")]
    best = [(min(laps[name].wall), min(laps[name].cpu)) for name in ("eight", "one")]
    print(
      f"  {policy:>20}  {best[0][0]:.2f} against {best[1][0]:.2f} s,"
      f" {best[0][1]:.2f} against {best[1][1]:.2f} CPU s:"
      f" {ratios[0]:.3f} in wall, {ratios[1]:.3f} in CPU time",
      flush=True,
    )


def guard(options: argparse.Namespace) -> None:
  """Print what a guardian costs a step, beside what two runs without differ by."""
  from race import race

  print("guard: steps of training that skips spikes, against two that look at none")
  for name, keys, steps in (("small", SMALL, 20), ("large", SIZE, 1)):
    made = {word: looped([*keys, *more], steps) for word, more in GUARDS.items()}
    laps = race(made, options.rounds)
    least = {word: min(its.wall) / steps * 1e3 for word, its in laps.items()}
    cost = [laps["with"].over(laps["without"], kind) for kind in ("wall", "cpu")]
    noise = [laps["again"].over(laps["without"], kind) for kind in ("wall", "cpu")]
    print(
      f"  {name}: {least['with']:.1f} against {least['without']:.1f} ms, {cost[0]:.4f} in wall,"
      f" {cost[1]:.4f} in CPU time; without again {noise[0]:.4f} and {noise[1]:.4f}",
      flush=True,
    )


def looped(keys: Sequence[str], steps: int) -> Callable[[], object]:
  """A function that trains so many steps, as a run does between two checkpoints."""
  import jax

  from maxtext import config, program
  from maxtext.training.incidents import Incidents
  from maxtext.training.loop import loop

  loaded = config.load([*keys, f"per_device_batch_size={ROWS}"], {})
  built = program.build(loaded, jax.devices()[:1])
  shapes = built.batch(ROWS)
  compiled = built.step.lower(built.state, shapes).compile()
  host = {
    name: _column(name, shape.shape, loaded.architecture.vocab_size)
    for name, shape in shapes.items()
  }
  place = lambda columns: {
    name: jax.device_put(x, shapes[name].sharding) for name, x in columns.items()
  }
  folder = pathlib.Path(tempfile.gettempdir())
  incidents = Incidents(folder, loaded.training, built.guard, built.state.params, {}, None, "facts")
  carried, guarded = [built.init()], built.guard is not None

  def lap() -> None:
    batches = (host for _ in range(steps))
    seen = incidents.seeing(batches, 0) if guarded else batches
    heard = incidents.heard if guarded else lambda done: None
    carried[0] = loop(compiled, carried[0], map(place, seen), range(steps), heard).state

  return lap


if __name__ == "__main__":
  main()
