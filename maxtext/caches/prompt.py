"""A cache in two parts, that of the prompt and that of what is generated after it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from maxtext.caches.dense import DenseCache, RingCache
from maxtext.caches.slabs import Storage
from maxtext.caches.store import Size, joined
from maxtext.errors import ConfigError
from maxtext.masks import Mask
from maxtext.sharding import SLOTS, active

Mode = Literal["prefill", "autoregressive"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptCache:
  """Tokens go to the `prompt` while the mode is prefill, and to what is `generated` afterwards.

  What is answered is over both parts, each of which is stored in its own way.
  """

  prompt: DenseCache
  generated: DenseCache
  mode: Mode = dataclasses.field(default="prefill", metadata={"static": True})

  @classmethod
  def empty(
    cls,
    size: Size,
    rows: int,
    slots: tuple[int, int],
    storages: tuple[Storage, Storage],
    reach: int | None = None,
  ) -> PromptCache:
    """Slots and storage of each part, the prompt's first.

    Of what is generated no more than `reach` tokens are kept: how far back the layer sees. Raises
    ConfigError for a part without slots, and for parts of which one keeps spans.
    """
    for key, count in zip(("max_prefill_predict_length", "max_target_length"), slots):
      if count < 1:
        problem = "leave at least one slot to the prompt and one to what is generated"
        raise ConfigError(key, f"{count} slots: {problem}")
    if storages[0].spans != storages[1].spans:
      raise ConfigError("spans", "are kept by both parts of a cache, or by neither")
    prompt = DenseCache.empty(size, rows, slots[0], storages[0])
    return cls(prompt, bounded(size, rows, slots[1], storages[1], reach).filled())

  @property
  def over(self) -> jax.Array:
    """Whether layers [l] have been given more tokens than a part has slots."""
    return self.prompt.over | self.generated.over

  def at(self, layer: jax.Array | None) -> PromptCache:
    """The same cache, open at one of its layers; None: closed."""
    parts = self.prompt.at(layer), self.generated.at(layer)
    return dataclasses.replace(self, prompt=parts[0], generated=parts[1])

  def filled(self) -> PromptCache:
    """The same cache after the first tokens: what follows sees them."""
    return dataclasses.replace(self, prompt=self.prompt.filled())

  def into(self, mode: Mode) -> PromptCache:
    """The same cache, in whose other part what follows is kept."""
    return dataclasses.replace(self.filled(), mode=mode)

  def append(
    self, k: jax.Array, v: jax.Array, mask: Mask
  ) -> tuple[PromptCache, jax.Array, jax.Array, Mask]:
    """k, v [b t g k] -> the cache with them, all keys, values [b s g k], the mask over [b t s]."""
    if self.mode == "prefill":
      if k.shape[1] > self.prompt.slots:
        problem = f"{k.shape[1]} tokens of prompt are more than its {self.prompt.slots} slots"
        raise ConfigError("max_prefill_predict_length", f"{problem}; raise it")
      part, *answer = self.prompt.append(k, v, mask)
      return dataclasses.replace(self, prompt=part), *answer
    part, *answer = self.generated.append(k, v, mask)
    return dataclasses.replace(self, generated=part), *joined(self.prompt.held(mask), answer)


def bounded(
  size: Size, rows: int, slots: int, storage: Storage, reach: int | None = None
) -> DenseCache:
  """A cache for tokens that are seen by the `reach` - 1 after them (None: by all): of all `slots`,
  or a ring of fewer, which a mesh that splits them divides.
  """
  ways = layout.ways(SLOTS) if (layout := active()) else 1
  if reach is not None and (ring := -(-reach // ways) * ways) < slots:
    return RingCache.empty(size, rows, ring, storage)
  return DenseCache.empty(size, rows, slots, storage)
