"""Tokens that are appended to a cache in parts, and the truth: one pass over all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxtext.caches import DenseCache, PagedCache, PromptCache, RowCache, Size, Storage, bounded
from maxtext.kernels import Scores, attend
from maxtext.masks import Mask
from maxtext.specs import CacheQuantSpec

HASTY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
ROWS, HEADS, GROUPS, WIDTH, VALUE_WIDTH, LAYERS = 2, 4, 2, 8, 6, 2
PROMPT, LENGTH, PAGE = 11, 33, 4
SCORES = Scores(0.4)
SIZE = Size(LAYERS, (GROUPS, WIDTH), (GROUPS, VALUE_WIDTH))

QUANTS = {
  "plain": None,
  "int8": CacheQuantSpec("int8", "heads_and_dkv"),
  "int8 per head": CacheQuantSpec("int8", "dkv"),
  "int4": CacheQuantSpec("int4", "dkv"),
  "fp8": CacheQuantSpec("fp8", "heads_and_dkv"),
}
STRUCTURES = {
  "all": {},
  "window": {"window": 5},
  "chunk": {"chunk": 6},
}


def dense(storage, reach):
  return DenseCache.empty(SIZE, ROWS, LENGTH, storage)


def ring(storage, reach):
  return bounded(SIZE, ROWS, LENGTH, storage, reach)


def rows(storage, reach):
  return dataclasses.replace(RowCache.empty(SIZE, ROWS, LENGTH, storage), fresh=True)


def row_rings(storage, reach):
  return RowCache.empty(SIZE, ROWS, reach or LENGTH, storage, ring=True)


def prompt(storage, reach, prompt_length=PROMPT):
  slots = prompt_length, LENGTH - prompt_length
  other = dataclasses.replace(storage, order=storage.order[::-1])
  return PromptCache.empty(SIZE, ROWS, slots, (storage, other), reach)


def paged(storage, reach):
  most = -(-LENGTH // PAGE)
  cache = PagedCache.empty(SIZE, ROWS, ROWS * most, PAGE, most, storage)
  return cache.paged(np.random.default_rng(0).permutation(ROWS * most).reshape(ROWS, most))


KINDS = {f.__name__: f for f in (dense, ring, rows, row_rings, prompt, paged)}


@functools.cache
def tokens(seed=0, length=LENGTH):
  """q, k, v of every layer [l b t heads k]."""
  random = np.random.default_rng(seed)
  shapes = [(HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, VALUE_WIDTH)]
  draw = lambda shape: random.normal(size=(LAYERS, ROWS, length, *shape)).astype(np.float32)
  return tuple(map(draw, shapes))


def marks(padding, lengths=(PROMPT, 7), packed=False):
  """Positions, segments [b t]: prompts of these lengths, padded on a side, and then the rest.

  Packed, a prompt's first four tokens are a document of their own.
  """
  positions, segments = np.zeros((2, ROWS, LENGTH), np.int32)
  for row, length in enumerate(lengths):
    begin = PROMPT - length if padding == "left" else 0
    true = [*range(begin, begin + length), *range(PROMPT, LENGTH)]
    positions[row, true] = np.arange(len(true))
    segments[row, true] = 1
    if packed:
      positions[row, true[4:]] -= 4
      segments[row, true[4:]] = 2
  return jnp.asarray(positions), jnp.asarray(segments)


def reach(structure):
  return min(structure.values(), default=None)


@functools.partial(jax.jit, static_argnames=("parts", "kernel"), compiler_options=HASTY)
def in_parts(cache, arrays, mask, parts, kernel="dot_product"):
  """[l b t h k], the tokens given to the cache in such parts, and then one by one; and the cache.

  A PromptCache has all of the parts in its prompt.
  """

  def give(cache, begin, size):
    cut = lambda x, axis: lax.dynamic_slice_in_dim(x, begin, size, axis)
    some = jax.tree.map(lambda x: cut(x, 1), Mask.of(mask.q_pos, mask.q_seg, mask.q_span))
    out = []
    for layer in range(LAYERS):
      q, k, v = (cut(x[layer], 1) for x in arrays)
      cache, k, v, held = cache.at(jnp.int32(layer)).append(k, v, some)
      held = held.narrow(mask.window, mask.chunk, mask.block)
      out.append(attend(kernel, q, k, v, held, SCORES))
    return cache.at(None), jnp.stack(out)

  out, begin = [], 0
  for size in parts:
    cache, y = give(cache, begin, size)
    out.append(y)
    cache, begin = cache.filled(), begin + size
  if isinstance(cache, PromptCache):
    cache = cache.into("autoregressive")
  length = arrays[0].shape[2]
  cache, y = lax.scan(lambda c, i: give(c, i, 1), cache, jnp.arange(begin, length))
  return jnp.concatenate([*out, jnp.einsum("nlbthk->lbnhk", y)], axis=2), cache


@functools.partial(jax.jit, static_argnames="storage", compiler_options=HASTY)
def one_pass(arrays, mask, storage=None):
  """[l b t h k] without a cache; over keys and values as a storage rounds them."""
  store = DenseCache.empty(SIZE, ROWS, 1, storage or Storage(jnp.float32)).store
  out = []
  for layer in range(LAYERS):
    q, k, v = (x[layer] for x in arrays)
    k, v = store.keys.rounded(k), store.values.rounded(v)
    out.append(attend("dot_product", q, k, v, mask, SCORES))
  return jnp.stack(out)


def assert_equal(ours, truth):
  """Equal but for float32 sums in another order, of numbers of size 1."""
  np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-5)
