"""Compare the attention kernels on this machine: time and memory, forward and with gradients.

  python scripts/benchmark_attention.py [--lengths 512 2048] [--rounds 9] [--heads 8] [--kv-heads 4]

Each line has one rival of blockwise: dot_product, or jax.nn.dot_product_attention, which knows of
causality, not of documents. Ratios are blockwise's time by its rival's, medians over interleaved
rounds; memory is what XLA allots beside arguments and results. kernels.LONG is chosen from these
figures.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
from race import race

from maxtext.kernels import Scores, attend
from maxtext.masks import Mask

OURS = "blockwise"
RIVALS = ("dot_product", "jax.nn")
HEADER = (
  f"{'queries x keys':>16} {'rows':>4} {'pass':>9} {'rival':>12}  {'ours ms':>8} {'rival ms':>8}"
  f" {'cpu ratio':>9} {'wall ratio':>10}  {'ours MiB':>8} {'rival MiB':>9} {'share':>6}"
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
  parser.add_argument("--queries", type=int, help="how many of the keys' tokens ask; default all")
  parser.add_argument("--tokens", type=int, default=2048, help="rows are as many as make these")
  parser.add_argument("--heads", type=int, default=8)
  parser.add_argument("--kv-heads", type=int, default=4)
  parser.add_argument("--head-dim", type=int, default=64)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rounds", type=int, default=9)
  options = parser.parse_args()
  print(HEADER)
  for length in options.lengths:
    for gradient in (False, True):
      print(compare(length, gradient, options), flush=True)


def compare(length: int, gradient: bool, options: argparse.Namespace) -> str:
  """The lines of one length and pass."""
  rows = max(1, options.tokens // length)
  arrays, mask = make(rows, length, options)
  scores = Scores(options.head_dim**-0.5)
  whole = options.queries in (None, length)  # jax.nn is causal from the first slot only
  compiled = {
    name: jax.jit(functools.partial(differentiate if gradient else forward, name, scores))
    .lower(arrays, mask)
    .compile()
    for name in (OURS, *RIVALS[: 2 if whole else 1])
  }
  laps = race(
    {
      name: functools.partial(lambda f: jax.block_until_ready(f(arrays, mask)), f)
      for name, f in compiled.items()
    },
    options.rounds,
  )
  memory = {n: f.memory_analysis().temp_size_in_bytes / 2**20 for n, f in compiled.items()}
  shape, ours = f"{options.queries or length} x {length}", laps.pop(OURS)
  return "\n".join(
    f"{shape:>16} {rows:>4} {'gradient' if gradient else 'forward':>9} {name:>12}"
    f"  {min(ours.cpu) * 1e3:>8.1f} {min(theirs.cpu) * 1e3:>8.1f}"
    f" {ours.over(theirs, 'cpu'):>9.2f} {ours.over(theirs, 'wall'):>10.2f}"
    f"  {memory[OURS]:>8.1f} {memory[name]:>9.1f} {memory[OURS] / memory[name]:>6.3f}"
    for name, theirs in laps.items()
  )


def make(rows: int, length: int, options: argparse.Namespace):
  """q, k, v and the mask of packed documents that fill their rows."""
  queries = options.queries or length
  shapes = [(rows, queries, options.heads), *[(rows, length, options.kv_heads)] * 2]
  arrays = [
    jax.random.normal(jax.random.key(i), (*shape, options.head_dim), options.dtype)
    for i, shape in enumerate(shapes)
  ]
  positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
  segments = jnp.ones_like(positions)
  return arrays, Mask(positions[:, -queries:], positions, segments[:, -queries:], segments)


def forward(name: str, scores: Scores, arrays: list[jax.Array], mask: Mask) -> jax.Array:
  if name == "jax.nn":
    return jax.nn.dot_product_attention(*arrays, scale=scores.scale, is_causal=True)
  return attend(name, *arrays, mask, scores)


def differentiate(name: str, scores: Scores, arrays: list[jax.Array], mask: Mask):
  return jax.grad(lambda arrays: jnp.sin(forward(name, scores, arrays, mask)).sum())(arrays)


if __name__ == "__main__":
  main()
