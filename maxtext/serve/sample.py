"""The next token from its logits: the likeliest, or drawn among all or among the likeliest.

Everything is float32, works row by row, and draws by a key of (seed, row, position): what a row
gets does not depend on the batch it stands in.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from maxtext.data.tokenizers import Tokenizer
from maxtext.serve.sections import Decode

SMALLEST = 1e-30  # temperature; below it, division overflows


def keys(seed: int, rows: jax.Array, positions: jax.Array) -> jax.Array:
  """One random key for each row [b] and position [b] -> [b]."""
  of_row = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows)
  return jax.vmap(jax.random.fold_in)(of_row, positions)


def permit(logits: jax.Array, vocabulary: int, never: tuple[int, ...] = ()) -> jax.Array:
  """logits [b v] with -inf for ids from `vocabulary` on and for those in `never`."""
  ids = jnp.arange(logits.shape[-1])
  allowed = (ids < vocabulary) & ~jnp.isin(ids, jnp.array(never, jnp.int32))
  return jnp.where(allowed, logits.astype(jnp.float32), -jnp.inf)


def greedy(logits: jax.Array) -> jax.Array:
  """logits [b v] -> ids [b]: the likeliest; of several, the first."""
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def weighted(logits: jax.Array, keys: jax.Array, temperature: float = 1.0) -> jax.Array:
  """logits [b v] -> ids [b], each drawn with probability softmax(logits / temperature)."""
  return _draw(_temper(logits, temperature), keys)


def top_k(logits: jax.Array, keys: jax.Array, k: int, temperature: float = 1.0) -> jax.Array:
  """logits [b v] -> ids [b], drawn among the `k` likeliest."""
  best, ids = lax.top_k(logits, min(k, logits.shape[-1]))
  return _pick(ids, _draw(_temper(best, temperature), keys))


def nucleus(logits: jax.Array, keys: jax.Array, p: float, temperature: float = 1.0) -> jax.Array:
  """logits [b v] -> ids [b], drawn among the fewest likeliest that together have probability `p`.

  Probabilities are those after the temperature (Holtzman et al. 2020, section 3.1).
  """
  ranked, ids = lax.top_k(_temper(logits, temperature), logits.shape[-1])
  share = jax.nn.softmax(ranked, axis=-1)
  before = jnp.cumsum(share, axis=-1) - share
  kept = (before < p).at[:, 0].set(True)
  return _pick(ids, _draw(jnp.where(kept, ranked, -jnp.inf), keys))


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Chooses tokens as the section says, but none from `vocabulary` on and none in `never`."""

  section: Decode
  vocabulary: int
  never: tuple[int, ...] = ()

  @classmethod
  def of(cls, section: Decode, tokenizer: Tokenizer) -> Sampler:
    """For a tokenizer: its padding and its beginning of a document never are what comes next."""
    never = {id for id in (tokenizer.pad, tokenizer.bos) if id is not None}
    return cls(section, tokenizer.vocab_size, tuple(sorted(never - {*tokenizer.stops})))

  def __call__(self, logits: jax.Array, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """logits [b v] -> ids [b] for these rows [b] at these positions [b]."""
    logits, how = permit(logits, self.vocabulary, self.never), self.section
    if how.decode_sampling_strategy == "greedy":
      return greedy(logits)
    draws, temperature = keys(how.decode_seed, rows, positions), how.decode_sampling_temperature
    if how.decode_sampling_strategy == "weighted":
      return weighted(logits, draws, temperature)
    if how.decode_sampling_strategy == "topk":
      return top_k(logits, draws, how.decode_sampling_top_k, temperature)
    return nucleus(logits, draws, how.decode_sampling_nucleus_p, temperature)


def _temper(logits: jax.Array, temperature: float) -> jax.Array:
  return (logits - logits.max(-1, keepdims=True)) / max(temperature, SMALLEST)


def _draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
  return jax.vmap(jax.random.categorical)(keys, logits)


def _pick(ids: jax.Array, index: jax.Array) -> jax.Array:
  return jnp.take_along_axis(ids, index[:, None], axis=-1)[:, 0].astype(jnp.int32)
