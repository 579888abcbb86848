"""The published attention layer, for both of flax's styles.

B batch, T query length, S key length, E width, N query heads, K key/value heads, D head_dim. The
decoder is built from the same layers by their specs (grouped.py, latent.py). Here the published
keywords become a spec, the published masks a Mask, and the cache is the layer's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from maxtext import caches, sharding
from maxtext.caches import PagedCache, PromptCache, RowCache, kept
from maxtext.errors import ConfigError
from maxtext.kernels.held import dense
from maxtext.layers import calls
from maxtext.layers.as_linen import as_linen, keywords
from maxtext.layers.grouped import Axes, GroupedAttention
from maxtext.layers.keywords import AttentionType, Keywords, check_mode
from maxtext.layers.latent import LatentAttention
from maxtext.layers.norms import L2Norm
from maxtext.layers.params import DenseInitializer, nd_dense_init
from maxtext.layers.vllm import Serving, ragged_paged_attention
from maxtext.specs import GridRopeSpec, RopeSpec

Part = tuple[jax.Array, jax.Array, jax.Array]  # keys, values [B, S, K, D], segment ids [B, S]

__all__ = [
  "MLA",
  "Attention",
  "AttentionType",
  "L2Norm",
  "attention_as_linen",
  "l2_norm_as_linen",
  "mla_as_linen",
]

_PREFILL_HEADS = (
  "activation_prefill_kv_batch",
  "prefill_activation_length",
  "activation_kv_heads",
  "activation_kv_head_dim",
)
_HEADS = (
  "activation_kv_batch",
  "activation_length_attn",
  "activation_kv_heads",
  "activation_kv_head_dim",
)
_DECODE = ("decode_batch", "decode_length")
_PREFILL = ("activation_prefill_kv_batch", "prefill_activation_length")
_TRAIN = ("activation_batch_attn", "activation_length_attn")


class Attention(GroupedAttention):
  """Multi-head, grouped-query or multi-query attention: (B, T, E), (B, S, E) -> (B, T, E).

  A cache exists unless `model_mode` is 'train': a prompt's part of `max_prefill_predict_length`
  slots (half of `max_target_length` where it is not given) and a part for what is generated. Scores
  and softmax are float32 whatever `float32_logits` says. With a mesh, activations are placed by the
  configuration's logical_axis_rules. Raises ValueError for heads that cannot be grouped, and
  ConfigError (a ValueError) for any other keyword that cannot be served.
  """

  def __init__(
    self,
    config: Any,
    num_query_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_target_length: int,
    mesh: jax.sharding.Mesh | None,
    attention_kernel: str,
    inputs_q_shape: Sequence[int],
    inputs_kv_shape: Sequence[int],
    dtype: Any = jnp.float32,
    weight_dtype: Any = jnp.float32,
    max_prefill_predict_length: int = -1,
    dropout_rate: float = 0.0,
    kernel_init: DenseInitializer = nd_dense_init(1.0, "fan_in", "normal"),  # noqa: B008
    float32_qk_product: bool = False,
    float32_logits: bool = False,
    quant: Any = None,
    kv_quant: Any = None,
    attention_type: AttentionType = AttentionType.GLOBAL,
    attn_logits_soft_cap: float | None = None,
    sliding_window_size: int | None = None,
    use_ragged_attention: bool = False,
    ragged_block_size: int = 256,
    use_qk_norm: bool = False,
    query_pre_attn_scalar: float | None = None,
    use_bias_in_projections: bool = False,
    share_kv_projections: bool = False,
    temperature_tuning: bool = False,
    temperature_tuning_scale: float = 0.1,
    temperature_tuning_floor_scale: float = 8192.0,
    prefill_query_axis_names: Axes = _PREFILL_HEADS,
    prefill_key_axis_names: Axes = _PREFILL_HEADS,
    prefill_value_axis_names: Axes = _PREFILL_HEADS,
    query_axis_names: Axes = _HEADS,
    key_axis_names: Axes = _HEADS,
    value_axis_names: Axes = _HEADS,
    input_axis_names: Axes = (*_TRAIN, "activation_embed_attn"),
    out_axis_names: Axes = (*_TRAIN, "activation_heads", "activation_kv"),
    prefill_input_axis_names: Axes = (*_PREFILL, "activation_embed_attn"),
    decode_input_axis_names: Axes = (*_DECODE, "activation_embed_attn"),
    prefill_out_axis_names: Axes = (*_PREFILL, "activation_heads", "activation_kv"),
    decode_out_axis_names: Axes = (*_DECODE, "activation_heads", "activation_kv"),
    prefill_cache_axis_order: tuple[int, ...] = (1, 2, 0, 3),
    ar_cache_axis_order: tuple[int, ...] = (1, 2, 0, 3),
    compute_axis_order: tuple[int, ...] = (0, 1, 2, 3),
    reshape_q: bool = False,
    is_nope_layer: bool = False,
    is_vision: bool = False,
    model_mode: str = "train",
    use_mrope: bool = False,
    mrope_section: tuple[int, int, int] | None = None,
    name: str | None = None,
    rope_type: str | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    given = Keywords({k: v for k, v in locals().items() if k in PUBLISHED})
    given.check()
    self.name, self.use_mrope = name, use_mrope
    self.mesh, self.layout = mesh, given.layout()
    self.names, self.storages, self.slots = given.names(), given.storages(), given.slots()
    self.cache_kind = given.cache_kind()
    spec = given.spec()
    if (spec.latent is None) == isinstance(self, LatentAttention):
      raise ConfigError("attention_type", "'mla' is for the layer MLA, which takes no other")
    self.widths = width, kv_width = inputs_q_shape[-1], inputs_kv_shape[-1]
    if spec.fused and width != kv_width:
      raise ConfigError("fused_qkv", f"needs inputs of one width, not of {width} and {kv_width}")
    super().__init__(spec, width, given.compute(), rngs, kernel_init, kv_width)
    self.rngs = rngs.fork()
    own = model_mode != "train" and self.cache_kind is not Serving
    self.kv_cache = nnx.Cache(_closed(self.init_kv_caches(inputs_kv_shape))) if own else None

  def convert_dense_general_inputs_shape(
    self, inputs_shape: Sequence[int], axis: Iterable[int] | int = -1
  ) -> tuple[int, ...]:
    """The sizes of those axes of inputs of this shape that a projection contracts."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return tuple(inputs_shape[i] for i in axes)

  def init_rotary_embedding(self) -> RopeSpec | GridRopeSpec | None:
    """How this layer rotates queries and keys; None: not at all."""
    return self.spec.rope or self.spec.grid

  def apply_rotary_embedding(
    self, inputs: jax.Array, inputs_positions: jax.Array | None = None, rope_kwargs: Any = None
  ) -> jax.Array:
    """Queries or keys [B, T, N, D] at positions [B, T], or [B, T, 3], rotated."""
    _refuse_rope_kwargs(rope_kwargs)
    if inputs_positions is None:
      inputs_positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
    return self.rotate(inputs, inputs_positions)

  def init_kv_caches(self, inputs_kv_shape: Sequence[int]) -> PromptCache | RowCache | PagedCache:
    """An empty cache for as many rows as inputs [B, S, E] of this shape have."""
    size, rows, reach = kept(self.spec, 1), inputs_kv_shape[0], caches.reach(self.spec)
    slots, storage = sum(self.slots), self.storages[1]
    if self.cache_kind is PagedCache:
      most = -(-slots // storage.block)
      return PagedCache.empty(size, rows, rows * most, storage.block, most, storage)
    if self.cache_kind is RowCache:
      return RowCache.empty(size, rows, slots, storage)
    return PromptCache.empty(size, rows, self.slots, self.storages, reach)

  def update_kv_caches(
    self,
    key: jax.Array,
    value: jax.Array,
    decoder_segment_ids: jax.Array | None,
    model_mode: str,
    previous_chunk: Any = None,
  ) -> list[Part | None]:
    """Keep rotated keys and values [B, T, K, D] after what the layer's own cache holds.

    Returns the prompt's part of the cache, and in mode 'autoregressive' the generated part (else
    None): keys and values [B, S, K, D] and segment ids [B, S], 0 where a slot is empty. Raises
    ConfigError for a cache that has no such parts.
    """
    check_mode(model_mode)
    cache = self._opened(model_mode, previous_chunk is None, key.shape[0])
    if not isinstance(cache, PromptCache):
      raise ConfigError("update_kv_caches", "this layer's cache has one part; call the layer")
    rows, length = key.shape[:2]
    tokens = calls.Tokens(None, decoder_segment_ids, None).check(rows, length, False)
    mask = tokens.mask((length, length), rows, calls.written(cache))
    cache, *_ = cache.append(key, value, mask)
    whole = functools.partial(calls.held_all, cache)
    self._keep(cache)
    parts = [cache.prompt, cache.generated if model_mode == "autoregressive" else None]
    return [part and _part(part.held(mask), whole) for part in parts]

  def forward_serve_vllm(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rpa_kv_cache: Any = None,
    rpa_metadata: Any = None,
  ) -> tuple[jax.Array, Any]:
    """query [B, T, N, D], key, value [B, T, K, D] -> (out [B, T, N, D], cache) by vLLM's kernel.

    Rows are flattened into one stream of tokens, whose requests `rpa_metadata` describes. Without
    cache or metadata, as in vLLM's dry run, (query, []). Raises ImportError where its package is
    not installed.
    """
    if rpa_kv_cache is None or rpa_metadata is None:
      return query, []
    sinks, tokens = None if self.sinks is None else self.sinks[...], (query, key, value)
    serving = Serving(rpa_kv_cache, rpa_metadata)
    return ragged_paged_attention(self.spec, self.mesh, tokens, sinks, serving)

  def __call__(
    self,
    inputs_q: jax.Array,
    inputs_kv: jax.Array,
    inputs_positions: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    out_sharding: jax.sharding.NamedSharding | None = None,
    *,
    model_mode: str = "train",
    deterministic: bool = False,
    previous_chunk: Any = None,
    slot: int | None = None,
    bidirectional_mask: jax.Array | None = None,
    rope_kwargs: Mapping[str, Any] | None = None,
    kv_cache: Any = None,
    attention_metadata: Any = None,
  ) -> tuple[jax.Array, Any]:
    """inputs_q (B, T, E), inputs_kv (B, S, E) -> (out (B, T, E), kv_cache).

    inputs_positions [B, T] are true token positions ([B, T, 3] with use_mrope), by default 0, 1, 2;
    while generating they must be given. decoder_segment_ids [B, T]: 0 is padding.
    bidirectional_mask [B, T]: neighbours that are True see each other both ways. 'prefill' starts
    the cache anew, unless `previous_chunk` (whatever it is) says that a part of the prompt is in it
    already; `slot` is the only row that the inputs belong to. kv_cache and attention_metadata are
    vLLM's, and kv_cache is returned as vLLM gives it back, else as it came.
    """
    _refuse_rope_kwargs(rope_kwargs)
    check_mode(model_mode)
    calls.check_inputs({"inputs_q": inputs_q, "inputs_kv": inputs_kv}, self.widths)
    parts = {"previous_chunk": previous_chunk, "slot": slot}
    pages = {"kv_cache": kv_cache, "attention_metadata": attention_metadata}
    calls.check_cached(model_mode, parts, self.cache_kind is Serving, pages)
    if model_mode == "autoregressive" and inputs_positions is None:
      raise ConfigError("inputs_positions", "must be given where earlier tokens are in a cache")
    (rows, length), kv_length = inputs_q.shape[:2], inputs_kv.shape[1]
    if model_mode != "train" and length != kv_length:
      raise ConfigError("inputs_kv", "a cache keeps the tokens of inputs_q; give it their length")
    tokens = calls.Tokens(inputs_positions, decoder_segment_ids, bidirectional_mask)
    tokens = tokens.check(rows, length, self.use_mrope)
    cache = self._cache(model_mode, previous_chunk, slot, rows, Serving(*pages.values()))
    own = cache is not None and not isinstance(cache, Serving)
    mask = tokens.mask((length, kv_length), rows, calls.written(cache) if own else 0)
    x, seed = self._cast(inputs_q), self._seed(deterministic)
    kv = None if inputs_kv is inputs_q else self._cast(inputs_kv)
    with sharding.use(self.layout or sharding.active()):
      names = self.names[model_mode]
      out, cache = super().__call__(x, mask, cache, seed, kv, tokens.several, names)
      out = out if out_sharding is None else jax.lax.with_sharding_constraint(out, out_sharding)
    if not own:
      return out, cache.pages if isinstance(cache, Serving) else kv_cache
    out = calls.held_all(cache, out)
    self._keep(cache, slot)
    return out, kv_cache

  def _seed(self, deterministic: bool) -> jax.Array | None:
    """What draws dropout, if there is any."""
    if deterministic or not self.spec.dropout:
      return None
    if "dropout" not in self.rngs and "default" not in self.rngs:
      raise ConfigError("dropout_rate", "needs rngs={'dropout': key}, or deterministic=True")
    return jax.random.bits(self.rngs.dropout(), (2,), jnp.uint32)

  def _cache(
    self, mode: str, previous_chunk: Any, slot: int | None, rows: int, serving: Serving
  ) -> Any:
    """What a call with so many rows appends to; None in training."""
    if mode == "train":
      return None
    if self.cache_kind is Serving:
      return serving
    cache = self._opened(mode, previous_chunk is None and slot is None, rows)
    calls.check_slot(slot, calls.rows(cache))
    if (wanted := calls.rows(cache) if slot is None else 1) != rows:
      raise ConfigError("inputs_q", f"{rows} rows, but {wanted} are to be continued in the cache")
    if slot is None:
      return cache
    if isinstance(cache, PromptCache):
      raise ConfigError(
        "slot", "this cache fills all rows alike; use use_ragged_attention=True, or kernel 'paged'"
      )
    row = cache.row(slot)
    return row.reset(0) if mode == "prefill" and previous_chunk is None else row

  def _opened(self, mode: str, anew: bool, rows: int) -> Any:
    """The layer's own cache as a call in this mode finds it."""
    if mode == "train":
      raise ConfigError("model_mode", "'train' keeps no keys and values; use 'prefill'")
    if self.kv_cache is None:
      raise ConfigError("model_mode", f"a layer made for 'train' has no cache for {mode!r}")
    cache = self.kv_cache.get_value()
    if mode == "prefill" and anew:
      cache = self.init_kv_caches((rows, 0, 0))
    elif isinstance(cache, PromptCache):
      cache = cache.into(mode)
    return cache.at(jnp.int32(0))

  def _keep(self, cache: Any, slot: int | None = None) -> None:
    """Keep what a call has appended."""
    cache = _closed(cache)
    self.kv_cache.set_value(
      cache if slot is None else self.kv_cache.get_value().insert(cache, slot)
    )

  def _attend(self, q, k, v, mask, cache, seed):
    if not isinstance(cache, Serving):
      return super()._attend(q, k, v, mask, cache, seed)
    out, pages = self.forward_serve_vllm(q, k, v, cache.pages, cache.about)
    return out, Serving(pages, cache.about)


class MLA(Attention, LatentAttention):
  """Multi-head latent attention with Attention's keywords, attention_type=MLA among them.

  Ranks and widths are the configuration's q_lora_rank, kv_lora_rank, qk_nope_head_dim,
  qk_rope_head_dim and v_head_dim; with mla_naive_kvcache the cache holds expanded keys and values.
  """


def attention_as_linen(**options: Any) -> linen.Module:
  """Attention as a Linen module: the same keywords, all by name.

  Its parameters are boxed with their logical axis names (flax.linen.LogicallyPartitioned), and its
  cache is the collection 'cache'. Apply with mutable=['cache'] where the mode has one, and with
  rngs={'dropout': key} where there is dropout.
  """
  return as_linen(Attention, options)


def mla_as_linen(**options: Any) -> linen.Module:
  """MLA as a Linen module, as attention_as_linen."""
  return as_linen(MLA, options)


def l2_norm_as_linen(eps: float = 1e-6) -> linen.Module:
  """L2Norm as a Linen module."""
  return nnx.bridge.to_linen(L2Norm, eps=eps, skip_rng=True)


attention_as_linen.__signature__ = mla_as_linen.__signature__ = keywords(Attention)
PUBLISHED = frozenset(keywords(Attention).parameters)


def _closed(cache: Any) -> Any:
  """A cache as it is kept between calls: of one structure, that loops may carry it."""
  cache = cache.at(None).filled()
  return cache.into("prefill") if isinstance(cache, PromptCache) else cache


def _part(answer: tuple, whole: Callable[[jax.Array], jax.Array]) -> Part:
  keys, values, mask = answer
  return whole(dense(keys)), whole(dense(values)), mask.kv_seg


def _refuse_rope_kwargs(given: Mapping[str, Any] | None) -> None:
  if given:
    raise ConfigError("rope_kwargs", f"{', '.join(given)}: this layer's rotation takes none")
