"""Attention by vLLM's kernel for TPU, over the pages that vLLM keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maxtext.errors import ConfigError
from maxtext.specs import AttentionSpec


@dataclasses.dataclass(frozen=True)
class Serving:
  """A cache that vLLM keeps: its pages, and what it says about the requests in them."""

  pages: Any
  about: Any


def ragged_paged_attention(
  spec: AttentionSpec,
  mesh: jax.sharding.Mesh | None,
  tokens: tuple[jax.Array, jax.Array, jax.Array],
  sinks: jax.Array | None,
  serving: Serving,
) -> tuple[jax.Array, Any]:
  """Queries [B, T, N, D], keys and values [B, T, K, D] -> ([B, T, N, D], the pages with them).

  Raises ImportError where the package is not there, ConfigError for a layer it cannot serve.
  """
  try:
    from tpu_inference.layers.common.attention_interface import sharded_ragged_paged_attention
  except ImportError as e:
    raise ImportError(
      "vLLM RPA attention ops require the vllm-tpu package. Please install it with "
      "`pip install vllm-tpu`."
    ) from e
  if why := _lacking(spec):
    raise ConfigError("attention_kernel", f"'vllm_rpa' cannot serve this layer: it has no {why}")
  about = serving.about
  flat = [x.reshape(-1, *x.shape[2:]) for x in tokens]
  requests = (about.seq_lens, about.block_tables, about.query_start_loc, about.request_distribution)
  sinks = None if sinks is None else sinks.astype(jnp.float32)
  scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
  scales = (None, None, None)  # of quantised queries, keys and values
  out, pages = sharded_ragged_paged_attention(
    mesh, *flat, serving.pages, *requests, sinks, scale, spec.window, *scales
  )
  return out.reshape(tokens[0].shape), pages


def _lacking(spec: AttentionSpec) -> str | None:
  """What vLLM's kernel has not of what the layer needs."""
  needed = {
    "soft cap": spec.soft_cap,
    "chunks": spec.chunk,
    "blocks": spec.block,
    "attention both ways": not spec.causal,
    "latents": spec.latent,
    "dropout": spec.dropout,
  }
  return next((name for name, value in needed.items() if value), None)
