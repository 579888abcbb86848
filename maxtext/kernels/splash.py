"""Flash attention on TPU: JAX's own splash kernel, its blocks scheduled by the mask's structure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from maxtext.kernels import OUT, Scores, register
from maxtext.kernels.options import Blocks
from maxtext.kernels.split import Split
from maxtext.masks import Mask
from maxtext.sharding import platform

if TYPE_CHECKING:  # a tenth of a second to import, which is paid where it is used
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

DEFAULT = Blocks()
INTERPRET = False  # run the kernel's program on any device, slowly: for tests


def _unfit(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None,
  seed: jax.Array | None,
) -> str | None:
  if platform() != "tpu" and not INTERPRET:
    return "it runs on TPU"
  if jax.dtypes.canonicalize_dtype(jnp.int64) == jnp.int64:
    return "JAX's kernel cannot be traced where numbers of 64 bits are enabled"
  if not mask.ordered or q.shape[1] != k.shape[1]:
    return "its schedule needs tokens in order, queries and keys the same, as rows in training are"
  if mask.block is not None:
    return "it cannot see to the end of a block, which stands elsewhere in each document"
  if mask.q_span is not None:
    return "it has no spans of tokens that all see each other"
  if seed is not None:
    return "it has no dropout"
  if scores.f32_product and q.dtype != jnp.float32:
    return f"it computes q.k from {q.dtype}, not float32"
  if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
    return f"queries, keys and values are {q.dtype}, {k.dtype}, {v.dtype}, not of one kind it has"
  split = Split.of(q, k)
  if split is not None and split.length:
    return "the length is split over devices; choose a context_parallel_strategy"
  return None if split is None else split.crossed


@register("flash", _unfit, tuned=True)
def flash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None = None,
  seed: jax.Array | None = None,
  blocks: Blocks = DEFAULT,
) -> jax.Array:
  """q [b t h k], k [b t g k], v [b t g k] -> [b t h k]; memory grows with t.

  Softmax and sums are float32, the weights too; scaled queries have the inputs' dtype. Rows of
  padding are zeros. A length that blocks do not divide is padded.
  """

  def part(q, k, v, mask, sink):
    return _attention(blocks, scores, q, k, v, mask, sink)

  split = Split.of(q, k)
  return part(q, k, v, mask, sink) if split is None else split.run(part, q, k, v, mask, sink)


def _attention(blocks: Blocks, scores: Scores, q, k, v, mask: Mask, sink) -> jax.Array:
  """The same on one device. The kernel tags its result and log-sums with OUT."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  t, h = q.shape[1:3]
  length, blocks = blocks.fitted(t)
  ids = _segments(mask)
  if ids is None and length > t:
    ids = jnp.ones_like(mask.q_pos)
  pad = lambda x: jnp.pad(x, [(0, 0), (0, length - t)] + [(0, 0)] * (x.ndim - 2))
  q = (q.astype(jnp.float32) * scores.scale).astype(q.dtype)
  q, k, v = (jnp.einsum("bthk->bhtk", pad(x)) for x in (q, k, v))
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([_pattern(mask, length)] * h),
    block_sizes=_sizes(blocks),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=scores.soft_cap,
    residual_checkpoint_name=OUT,
    interpret=INTERPRET,
  )
  pair = None if ids is None else splash.SegmentIds(pad(ids), pad(ids))
  row = lambda q, k, v, pair: kernel(q, k, v, pair, None if sink is None else _own(sink))
  out = jax.vmap(row)(q, k, v, pair)
  out = jnp.einsum("bhtk->bthk", out)[:, :t]
  # Padding has a segment like any other there: its tokens see each other.
  return out if mask.q_seg is None else jnp.where(mask.q_seg[..., None, None] != 0, out, 0)


@jax.custom_vjp
def _own(sink: jax.Array) -> jax.Array:
  """The sink itself, whose gradient comes back in its own dtype; the kernel's has that of q."""
  return sink


_own.defvjp(lambda sink: (sink, sink), lambda sink, g: (g.astype(sink.dtype),))


def _pattern(mask: Mask, length: int) -> splash.Mask:
  """Who may see whom by the slots in which tokens stand; chunks are bounded, not cut."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  reach = [side - 1 for side in (mask.window, mask.chunk) if side is not None]
  back = min(reach) if reach else None
  ahead = 0 if mask.causal else None if mask.chunk is None else mask.chunk - 1
  if back is None and ahead is None:
    return splash.FullMask((length, length))
  return splash.LocalMask((length, length), (back, ahead), offset=0)


def _segments(mask: Mask) -> jax.Array | None:
  """Numbers [b t] that are equal where tokens see each other but for the pattern; 0 is padding.

  A document's chunks, being cut by position, are documents of their own.
  """
  if mask.chunk is None:
    return mask.q_seg
  marks = [mask.q_pos // mask.chunk] + ([] if mask.q_seg is None else [mask.q_seg])
  first = jnp.zeros_like(mask.q_pos[:, :1])
  new = [jnp.concatenate([first, jnp.diff(x, axis=1) != 0], axis=1) for x in marks]
  ids = 1 + jnp.cumsum(sum(new) != 0, axis=1)
  return ids if mask.q_seg is None else jnp.where(mask.q_seg == 0, 0, ids)


def _sizes(blocks: Blocks) -> splash.BlockSizes:
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  fused, layouts = blocks.fused_backward, splash.QKVLayout
  return splash.BlockSizes(
    block_q=blocks.q,
    block_kv=blocks.kv,
    block_kv_compute=blocks.kv_compute,
    block_q_dkv=blocks.q_dkv,
    block_kv_dkv=blocks.kv_dkv,
    block_kv_dkv_compute=blocks.kv_dkv_compute,
    block_q_dq=None if fused else blocks.q_dq,
    block_kv_dq=None if fused else blocks.kv_dq,
    use_fused_bwd_kernel=fused,
    q_layout=layouts[blocks.q_layout],
    k_layout=layouts[blocks.k_layout],
    v_layout=layouts[blocks.v_layout],
  )
