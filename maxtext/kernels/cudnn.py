"""Flash attention on NVIDIA GPUs: cuDNN's kernel, through JAX."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxtext.kernels import OUT, Scores, register
from maxtext.kernels.split import Split
from maxtext.masks import Mask
from maxtext.sharding import platform


def _unfit(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None,
  seed: jax.Array | None,
) -> str | None:
  if platform() != "gpu":
    return "it runs on NVIDIA GPUs"
  if not planned():
    return "it is compiled where there is a GPU"
  return lacking(q, k, v, mask, scores, sink, seed)


def planned() -> bool:
  """Whether there is a GPU, which is asked for the kernel's plan."""
  return jax.default_backend() == "gpu"


def lacking(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None = None,
  seed: jax.Array | None = None,
) -> str | None:
  """What this layer needs, in words, that cuDNN does not have on any GPU."""
  if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"queries, keys and values are {q.dtype}, {k.dtype}, {v.dtype}; it has 16-bit floats"
  if q.shape[-1] % 8 or q.shape[-1] > 128 or v.shape[-1] != q.shape[-1]:
    sizes = f"{q.shape[-1]} of queries, {v.shape[-1]} of values"
    return f"head_dim is {sizes}; it has one multiple of 8 up to 128"
  for what, wanted in (
    ("soft cap", scores.soft_cap is not None),
    ("float32 product", scores.f32_product),
    ("sink", sink is not None),
    ("dropout by our seeds", seed is not None),
  ):
    if wanted:
      return f"it has no {what}"
  if (q.shape[1] % 2 or k.shape[1] % 2) and not _plain(mask):
    return f"the lengths {q.shape[1]} and {k.shape[1]} are not even, as a mask in memory must be"
  split = Split.of(q, k)
  if split is not None and split.length:
    return "the length is split over devices; choose a context_parallel_strategy"
  return None if split is None else split.crossed


@register("cudnn_flash", _unfit)
def cudnn_flash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None = None,
  seed: jax.Array | None = None,
) -> jax.Array:
  """q [b t h k], k [b s g k], v [b s g k] -> [b t h k]; softmax and sums are float32.

  Memory grows with t + s where causality and a window over one document in order say all, else the
  mask [b 1 t s] stands in memory in the inputs' dtype. A layer that is computed again runs the
  forward pass again: what its gradient needs beside the result cannot be tagged.
  """

  def part(q, k, v, mask, sink):
    return attention("cudnn", q, k, v, mask, scores)

  split = Split.of(q, k)
  return part(q, k, v, mask, sink) if split is None else split.run(part, q, k, v, mask, sink)


def attention(
  implementation: Literal["cudnn", "xla"],
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
) -> jax.Array:
  """The same on one device, by either implementation that JAX has of it; rows that see nothing are
  zeros.
  """
  causal = _sloped(mask)
  seen = None if _plain(mask) else mask.dense()
  y = jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=None if seen is None else seen[:, None],
    scale=scores.scale,
    is_causal=causal,
    local_window_size=(mask.window - 1, 0) if causal and mask.window is not None else None,
    implementation=implementation,
  )
  y = y if seen is None else jnp.where(seen.any(-1)[..., None, None], y, 0)
  return checkpoint_name(y, OUT)


def _sloped(mask: Mask) -> bool:
  """Whether slots alone tell that no token sees a later one, so that half the work can go."""
  return mask.ordered and mask.causal and mask.block is None and mask.q_span is None


def _plain(mask: Mask) -> bool:
  """Whether the kernel's own causality and window say all that the mask says."""
  bare = mask.q_seg is None and mask.q_span is None and mask.chunk is None and mask.block is None
  return bare and (_sloped(mask) or not (mask.causal or mask.window is not None))
