"""Compare the kinds of caches on this machine: tokens a second while decoding, one layer.

  python scripts/benchmark_decode.py [--slots 4096] [--filled 256 2048] [--rows 4] [--rounds 9]

Contestants take turns and start from the same tokens, in rows of different lengths (the shortest
has half of the longest); a lap is 32 tokens. Ratios are medians over rounds against `dense`, which
reads all slots. `ring` has a window an eighth of the slots, and so other numbers than the rest.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from race import race

from maxtext.caches import DenseCache, PagedCache, RingCache, RowCache, Storage, kept
from maxtext.layers.grouped import GroupedAttention
from maxtext.layers.params import Compute
from maxtext.masks import Mask
from maxtext.specs import AttentionSpec, CacheQuantSpec

WIDTH, STEPS, BLOCK = 512, 32, 256
SPEC = AttentionSpec(8, 4, 64)
KINDS = {  # name -> cache, kernel
  "dense": (DenseCache, "dot_product"),
  "dense int8": (DenseCache, "dot_product"),
  "dense, ragged kernel": (DenseCache, "ragged"),
  "rows, ragged kernel": (RowCache, "ragged"),
  "paged, ragged kernel": (PagedCache, "ragged"),
  "ring": (RingCache, "dot_product"),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--slots", type=int, default=4096)
  parser.add_argument("--filled", type=int, nargs="+", default=[256, 2048, 4000])
  parser.add_argument("--rows", type=int, default=4)
  parser.add_argument("--rounds", type=int, default=9)
  options = parser.parse_args()
  for filled in options.filled:
    print(f"{filled} of {options.slots} slots, {options.rows} rows")
    contestants = {name: contestant(name, filled, options) for name in KINDS}
    laps = race({name: lap for name, (lap, _) in contestants.items()}, options.rounds)
    for name, its in laps.items():
      rate = options.rows * STEPS / min(its.wall)
      ratio = 1 / its.over(laps["dense"], "wall")
      size = contestants[name][1] / 2**20
      print(f"  {name:>22} {rate:8.0f} tokens/s {ratio:6.2f} of dense {size:7.1f} MiB", flush=True)


def contestant(name: str, filled: int, options: argparse.Namespace):
  """A function that decodes a lap's tokens, and the bytes of the cache."""
  kind, kernel = KINDS[name]
  window = options.slots // 8 if kind is RingCache else None
  spec = dataclasses.replace(SPEC, window=window)
  quant = CacheQuantSpec("int8") if "int8" in name else None
  storage = Storage(jnp.float32, quant, block=BLOCK)
  cache = empty(kind, spec, window or options.slots, storage, options)
  layer = GroupedAttention(spec, WIDTH, Compute(decode_kernel=kernel), nnx.Rngs(0))
  graph, params = nnx.split(layer)
  lengths = filled - jnp.arange(options.rows) * (filled // 2) // max(1, options.rows - 1)
  segments = (jnp.arange(filled) < lengths[:, None]).astype(jnp.int32)
  x = jax.random.normal(jax.random.key(0), (options.rows, filled, WIDTH))
  positions = jnp.broadcast_to(jnp.arange(filled), segments.shape)
  step = lambda params, x, mask, cache: nnx.merge(graph, params)(x, mask, cache)
  zero = jnp.int32(0)
  _, cache = jax.jit(step)(params, x, Mask.of(positions, segments), cache.at(zero))
  held = cache.filled()

  @jax.jit
  def lap(params, x, cache):
    def one(carry, i):
      x, cache = carry
      mask = Mask.of((lengths + i)[:, None], jnp.ones((options.rows, 1), jnp.int32))
      y, cache = step(params, x, mask, cache)
      return (y, cache), None

    return jax.lax.scan(one, (x, cache), jnp.arange(STEPS))[0][0]

  run = lambda: jax.block_until_ready(lap(params, x[:, :1], held))
  return run, sum(leaf.nbytes for leaf in jax.tree.leaves(held))


def empty(kind: type, spec: AttentionSpec, slots: int, storage: Storage, options):
  """A cache of that kind."""
  size = kept(spec, 1)
  if kind is PagedCache:
    most = slots // BLOCK
    return PagedCache.empty(size, options.rows, options.rows * most, BLOCK, most, storage)
  return kind.empty(size, options.rows, slots, storage)


if __name__ == "__main__":
  main()
