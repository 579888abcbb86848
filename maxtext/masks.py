"""Which query may see which key: described once, read by every kernel and every cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


def _static(default: Any) -> Any:
  return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """Who sees whom among queries and keys; the structure is static, the content is traced.

  q_pos [b t] and kv_pos [b s] are true token positions, q_seg and kv_seg the documents that the
  tokens belong to (0 is padding: it sees nothing and nobody sees it), q_span and kv_span the
  stretches whose tokens all see each other, whatever the structure says, as a prefix or an image
  (0: of none). Otherwise a query sees a key of its own document when the structure allows it:
  `causal` (key not after query), or `block` (key not in a later block of so many positions);
  `window` (`q - window < k`); and `chunk` (both in the same chunk of so many positions).

  `ordered` claims that queries and keys are the same tokens, each document in one piece, and its
  positions one apart: then the slots in which tokens stand say what a static schedule needs. Keys
  that are `cached` stand in a cache, whose slots a mesh may split.
  """

  q_pos: jax.Array
  kv_pos: jax.Array
  q_seg: jax.Array | None = None
  kv_seg: jax.Array | None = None
  q_span: jax.Array | None = None
  kv_span: jax.Array | None = None
  causal: bool = _static(True)
  window: int | None = _static(None)
  chunk: int | None = _static(None)
  block: int | None = _static(None)
  ordered: bool = _static(False)
  cached: bool = _static(False)

  @classmethod
  def of(
    cls,
    positions: jax.Array,
    segments: jax.Array | None = None,
    spans: jax.Array | None = None,
    ordered: bool = False,
  ) -> Mask:
    """The causal mask of tokens among themselves: positions, segments, spans [b t]."""
    return cls(positions, positions, segments, segments, spans, spans, ordered=ordered)

  def narrow(
    self,
    window: int | None = None,
    chunk: int | None = None,
    block: int | None = None,
    causal: bool = True,
  ) -> Mask:
    """The same tokens, seen by a layer of this structure."""
    causal = self.causal and causal
    return dataclasses.replace(self, window=window, chunk=chunk, block=block, causal=causal)

  def over(
    self, positions: jax.Array, segments: jax.Array | None, spans: jax.Array | None = None
  ) -> Mask:
    """The same queries over other keys [b s], those that a cache holds."""
    other = dataclasses.replace(self, kv_pos=positions, kv_seg=segments, kv_span=spans)
    return dataclasses.replace(other, ordered=False, cached=False).marked()

  def marked(self) -> Mask:
    """The same mask with segments and spans given for queries and keys alike, or for neither."""
    new: dict[str, Any] = {}
    for mark, missing in (("seg", 1), ("span", 0)):
      for side, other in (("q", "kv"), ("kv", "q")):
        if getattr(self, f"{side}_{mark}") is None and getattr(self, f"{other}_{mark}") is not None:
          new[f"{side}_{mark}"] = jnp.full_like(getattr(self, f"{side}_pos"), missing)
    return dataclasses.replace(self, **new)

  def allows(self, q_pos: jax.Array, kv_pos: jax.Array, seg=None, span=None) -> jax.Array:
    """The predicate itself, on arrays that broadcast; `seg` and `span` are pairs (query, key)."""
    ok = jnp.ones(jnp.broadcast_shapes(q_pos.shape, kv_pos.shape), bool)
    if self.block is not None:
      ok &= q_pos // self.block >= kv_pos // self.block
    elif self.causal:
      ok &= q_pos >= kv_pos
    if self.window is not None:
      ok &= q_pos - kv_pos < self.window
    if self.chunk is not None:
      ok &= q_pos // self.chunk == kv_pos // self.chunk
    if span is not None:
      ok |= (span[0] == span[1]) & (span[0] != 0)
    if seg is not None:
      ok &= (seg[0] == seg[1]) & (seg[1] != 0)
    return ok

  def dense(self) -> jax.Array:
    """bool [b t s], True where the query sees the key."""
    return self.allows(
      self.q_pos[:, :, None],
      self.kv_pos[:, None, :],
      _pairs(self.q_seg, self.kv_seg),
      _pairs(self.q_span, self.kv_span),
    )


def _pairs(q: jax.Array | None, kv: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
  """[b t], [b s] -> arrays that broadcast to [b t s]."""
  return None if q is None or kv is None else (q[:, :, None], kv[:, None, :])
