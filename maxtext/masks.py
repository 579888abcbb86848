"""Which query may see which key: described once, read by every kernel and every cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """Who sees whom among queries and keys; the structure is static, the content is traced.

  q_pos [b t] and kv_pos [b s] are true token positions, q_seg [b t] and kv_seg [b s] the documents
  that the tokens belong to (0 is padding: it sees nothing and nobody sees it). A query sees a key
  of its own document when the structure allows their positions: `causal` (key not after query) and
  `window` (`q - window < k <= q`).
  """

  q_pos: jax.Array
  kv_pos: jax.Array
  q_seg: jax.Array | None = None
  kv_seg: jax.Array | None = None
  causal: bool = dataclasses.field(default=True, metadata={"static": True})
  window: int | None = dataclasses.field(default=None, metadata={"static": True})

  @classmethod
  def of(cls, positions: jax.Array, segments: jax.Array | None = None) -> Mask:
    """The causal mask of tokens among themselves: positions [b t], segments [b t]."""
    return cls(positions, positions, segments, segments)

  def narrow(self, window: int | None) -> Mask:
    """The same mask for a layer that looks back no more than `window` tokens (None: all)."""
    return dataclasses.replace(self, window=window)

  def allows(self, q_pos: jax.Array, kv_pos: jax.Array, q_seg=None, kv_seg=None) -> jax.Array:
    """The predicate itself, on arrays that broadcast against each other."""
    ok = jnp.ones(jnp.broadcast_shapes(q_pos.shape, kv_pos.shape), bool)
    if self.causal:
      ok &= q_pos >= kv_pos
    if self.window is not None:
      ok &= q_pos - kv_pos < self.window
    if q_seg is not None:
      ok &= (q_seg == kv_seg) & (kv_seg != 0)
    return ok

  def dense(self) -> jax.Array:
    """bool [b t s], True where the query sees the key."""
    q_seg = None if self.q_seg is None else self.q_seg[:, :, None]
    kv_seg = None if self.kv_seg is None else self.kv_seg[:, None, :]
    return self.allows(self.q_pos[:, :, None], self.kv_pos[:, None, :], q_seg, kv_seg)
