"""Find the blocks of the TPU's attention kernel that its compiler gives the fewest cycles.

  python scripts/attention_blocks.py [RECIPE ...]

A compiled step says nothing of how long a hand-written kernel takes, but the compiler writes down
its schedule where it is told to: an instruction word (bundle) for every cycle. The kernels of each
attention of a recipe are compiled with other blocks; counted are the cycles of a step of a loop and
the steps that the mask leaves. Waiting for memory beyond its published speed is not. A recipe takes
from two minutes to half an hour of a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import hardware_table
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxtext import config, program, sharding, topology
from maxtext.config import Config
from maxtext.estimate.chips import CHIPS
from maxtext.jobs.machines import kind_of
from maxtext.kernels import Scores
from maxtext.kernels.options import KEYS, Blocks
from maxtext.kernels.splash import flash
from maxtext.masks import Mask
from maxtext.specs import AttentionSpec

SIDES, PARTS = (512, 1024, 2048), (256, 512, 1024)
FIELDS = {  # of Blocks: queries, keys, and of these those worked on at once
  "forward": ("q", "kv", "kv_compute"),
  "keys and values": ("q_dkv", "kv_dkv", "kv_dkv_compute"),
  "queries": ("q_dq", "kv_dq"),
}
KERNELS = {
  "forward": "splash_mha_fwd",
  "keys and values": "splash_mha_dkv",
  "queries": "splash_mha_dq",
}
PRODUCTS = {  # of queries by keys: by a key's width, by a value's
  "forward": (1, 1),
  "keys and values": (2, 2),
  "queries": (2, 1),
}
TOLD = (
  "--xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
  "--xla_jf_dump_llo_pass_label_regex=^final_bundles$ --xla_jf_dump_to="
)
HEADS = 2  # one for each core of a chip that has two


@dataclasses.dataclass(frozen=True)
class Step:
  """Cycles of a step of a kernel's loop: whatever it does, where it computes, and where a row of
  blocks begins or ends.
  """

  always: int
  computing: int
  ends: int


LINE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+(?:[A-Z]{2})?\s*:")
START = re.compile(r"Start(?:/End empty)? region (\d+)")
JUMP = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")


def step_of(schedule: str) -> Step:
  """Read from a kernel's final bundles; its longest loop is over the grid, and in it what may be
  jumped over is what only some steps do.
  """
  words: dict[int, str] = {}
  for line in schedule.splitlines():
    if found := LINE.match(line):
      words[at := int(found[1], 16)] = line
    elif words:
      words[at] += line  # a word that goes on
  starts = {region: at for at, word in words.items() for region in START.findall(word)}
  jumps = [(at, starts[r]) for at, word in words.items() for r in JUMP.findall(word) if r in starts]
  length, first = max((at - to, to) for at, to in jumps if to <= at)
  inside = [(at, to) for at, to in jumps if first <= at < to <= first + length]
  parts = {
    (at, to): any("vmatmul" in words[i] for i in range(at + 1, to))
    for at, to in inside
    if not any(" dma." in words[i] for i in range(at + 1, to))
  }
  outer = {
    part: computes
    for part, computes in parts.items()
    if not any(a <= part[0] and part[1] <= b and (a, b) != part for a, b in parts)
  }
  cycles = lambda chosen: sum(to - at for (at, to), computes in outer.items() if computes == chosen)
  return Step(length - cycles(True) - cycles(False), cycles(True), cycles(False))


@dataclasses.dataclass(frozen=True)
class Case:
  """One kind of attention of a recipe, over rows of this length, on its chip."""

  spec: AttentionSpec
  length: int
  chip: str
  options: Mapping[str, str]

  @property
  def cores(self) -> int:
    return 2 if self.chip in ("v4", "v5p") else 1

  @property
  def widths(self) -> tuple[int, int]:
    """Of a key and of a value."""
    latent = self.spec.latent
    return self.spec.head_dim, self.spec.head_dim if latent is None else latent.value_dim

  def seen(self, q: int, kv: int) -> np.ndarray:
    """bool [queries' blocks, keys' blocks]: where some query sees some key."""
    i, j = (np.arange(self.length // side) for side in (q, kv))
    last, first = (i[:, None] + 1) * q - 1, i[:, None] * q
    past = j * kv <= last
    window = self.spec.window
    return past if window is None else past & ((j + 1) * kv - 1 > first - window)

  def lower(self, kernel: str, blocks: Blocks) -> jax.stages.Lowered:
    """The kernel alone, for rows that hold several documents."""
    shape = lambda width: jax.ShapeDtypeStruct(
      (1, self.length, HEADS, width), jnp.bfloat16, sharding=self.place
    )
    ids = jax.ShapeDtypeStruct((1, self.length), jnp.int32, sharding=self.place)
    sink = jax.ShapeDtypeStruct((HEADS,), jnp.float32, sharding=self.place)
    scores = Scores(scale=1.0, soft_cap=self.spec.soft_cap)

    def run(q, k, v, ids, sink):
      mask = Mask.of(jnp.broadcast_to(jnp.arange(self.length), ids.shape), ids, ordered=True)
      mask = mask.narrow(window=self.spec.window)
      attend = lambda q, k, v: flash(
        q, k, v, mask, scores, sink if self.spec.sink else None, None, blocks
      )
      y, pull = jax.vjp(attend, q, k, v)
      dq, dk, dv = pull(jnp.ones_like(y))
      return {"forward": y, "queries": dq, "keys and values": (dk, dv)}[kernel]

    key, value = self.widths
    with sharding.use(sharding.Layout(self.place.mesh, sharding.Rules({}))):
      return jax.jit(run).lower(shape(key), shape(key), shape(value), ids, sink)

  @functools.cached_property
  def place(self) -> NamedSharding:
    devices = topology.devices(topology.parse(f"{self.chip}-8"), 1)[:1]
    return NamedSharding(Mesh(np.array(devices), ("fsdp",)), P())

  def step(self, kernel: str, blocks: Blocks, told: Path) -> Step | None:
    """None where the chip's memory beside its matrix units has no room for such blocks."""
    try:
      self.lower(kernel, blocks).compile(compiler_options=dict(self.options))
    except jax.errors.JaxRuntimeError as e:
      if "vmem" not in str(e).lower():
        raise
      return None
    finally:
      named = sorted(told.glob(f"*{KERNELS[kernel]}*-final_bundles.txt"))
      schedule = next((path.read_text() for path in named if "analysis" not in path.name), None)
      for path in told.iterdir():
        path.unlink()
    if schedule is None:
      raise RuntimeError(f"the compiler has written no schedule of {KERNELS[kernel]}")
    return step_of(schedule)

  def cycles(self, kernel: str, blocks: Blocks, step: Step) -> float:
    """Of a head and a row."""
    q, kv, *_ = (getattr(blocks, field) for field in FIELDS[kernel])
    seen = self.seen(q, kv) if kernel != "keys and values" else self.seen(q, kv).T
    moved = kv if kernel != "keys and values" else q  # tokens that a step reads
    speed = CHIPS[self.chip].bandwidth / self.cores / topology.KINDS[self.chip].clock
    read = moved * sum(self.widths) * 2 / speed
    steps, computing = seen.shape[0] * seen.sum(1).max(), seen.sum()
    work = max(step.always + step.computing, read)
    return float(computing * work + (steps - computing) * step.always + seen.shape[0] * step.ends)

  def least(self, kernel: str) -> float:
    """Cycles at the chip's peak, of the pairs that see each other."""
    reach = self.length if self.spec.window is None else min(self.spec.window, self.length)
    pairs = self.length * reach - reach * (reach - 1) / 2
    flops = 2 * pairs * np.dot(PRODUCTS[kernel], self.widths)
    return float(flops) * self.cores * topology.KINDS[self.chip].clock / CHIPS[self.chip].flops


def candidates(kernel: str) -> Iterator[Blocks]:
  """The default, and others."""
  queries, keys, *part = FIELDS[kernel]
  for q, kv in itertools.product(SIDES, SIDES):
    if not part:
      yield Blocks(**{queries: q, keys: kv})
    for compute in PARTS if part else ():
      if compute <= kv:
        yield Blocks(**{queries: q, keys: kv, part[0]: compute})


def cases(loaded: Config) -> Iterator[tuple[Case, int]]:
  """The kinds of attention of a recipe, and how many layers have each."""
  chip = kind_of(loaded.compile.compile_topology)
  options = loaded.compile.options(topology.KINDS[chip].named)
  counts: dict[AttentionSpec, int] = {}
  for stage in loaded.decoder(program.padded(0)).stages:
    for block in stage.blocks:
      spec = dataclasses.replace(block.attention, rope=None)
      counts[spec] = counts.get(spec, 0) + stage.repeat
  for spec, layers in counts.items():
    yield Case(spec, loaded.training.max_target_length, chip, options), layers


def best(loaded: Config, kernel: str, told: Path) -> str:
  """Which blocks make a kernel fastest, and how near to the chip's peak."""
  known = list(cases(loaded))
  found: dict[Blocks, float] = {}
  for blocks in candidates(kernel):
    steps = [case.step(kernel, blocks, told) for case, _ in known]
    if all(steps):
      found[blocks] = sum(n * c.cycles(kernel, blocks, s) for (c, n), s in zip(known, steps) if s)
  least = sum(layers * case.least(kernel) for case, layers in known)
  chosen = min(found, key=lambda blocks: found[blocks])
  keys = " ".join(f"{KEYS[field]}={getattr(chosen, field)}" for field in FIELDS[kernel])
  return (
    f"{least / found[Blocks()]:.0%} of the peak by default, {least / found[chosen]:.0%} with {keys}"
  )


@contextlib.contextmanager
def schedules() -> Iterator[Path]:
  """The folder to which the compiler writes what it schedules, if no TPU's was asked for before."""
  with tempfile.TemporaryDirectory() as place:
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {TOLD}{place}"
    jax.config.update("jax_platforms", "cpu")  # that no TPU is looked for
    yield Path(place)


def main() -> None:
  known = hardware_table.recipes()
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(known))
  names = parser.parse_args().recipes or known
  if unknown := set(names) - set(known):
    parser.error(f"{unknown.pop()!r} is none of {', '.join(known)}")
  with schedules() as told:
    for name in names:
      path = str(hardware_table.RECIPES / f"{name}.yml")
      loaded = config.load([path, "hardware=tpu"], {}, purpose="launch")
      topology.prepare(topology.parse(loaded.compile.compile_topology), os.environ)
      print(f"{name}:", flush=True)
      for kernel in FIELDS:
        print(f"  {kernel}: {best(loaded, kernel, told)}", flush=True)


if __name__ == "__main__":
  main()
