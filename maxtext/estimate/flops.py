"""What a model needs, from its spec alone: parameters, and FLOPs in its products."""

from __future__ import annotations

import dataclasses

from maxtext.specs import AttentionSpec, BlockSpec, DecoderSpec, DeltaSpec, MlpSpec, NormSpec


@dataclasses.dataclass(frozen=True)
class Flops:
  """Floating-point operations, a multiplication and an addition counted as two, in matmuls only.

  `weights` multiply activations by parameters; `attention` multiplies activations by each other,
  or by the state of a delta net.
  Recomputation for the backward pass is not counted: this is what the model needs, not what a
  program happens to do.
  """

  weights: float
  attention: float

  @property
  def total(self) -> float:
    return self.weights + self.attention

  def __mul__(self, factor: float) -> Flops:
    return Flops(self.weights * factor, self.attention * factor)


def forward_flops(spec: DecoderSpec, tokens: int, length: int) -> Flops:
  """One forward pass over `tokens` tokens in causal sequences of `length`."""
  pairs = sum(_mixing(block, length) for block in (*spec.blocks, *_further(spec)))
  return Flops(2.0 * matmul_parameters(spec) * tokens, 2.0 * pairs * tokens / length)


def step_flops(spec: DecoderSpec, tokens: int, length: int) -> Flops:
  """One training step over `tokens` tokens: the backward pass has two products for each forward."""
  return forward_flops(spec, tokens, length) * 3


def _mixing(block: BlockSpec, length: int) -> float:
  """Products of two activations in one sequence.

  Of attention q.k and weights.v, each of head_dim terms for every pair of tokens and every head. Of
  a delta net, for every token and value head, three with the state: what it holds of the key, its
  correction, and what the query reads. That is the recurrence; its chunks multiply more.
  """
  mixer = block.mixer
  if isinstance(mixer, DeltaSpec):
    return 3.0 * length * mixer.value_heads * mixer.key_dim * mixer.value_dim
  return mixer.heads * (mixer.head_dim + _value_dim(mixer)) * _pairs(length, mixer)


def _pairs(length: int, spec: AttentionSpec) -> float:
  """Pairs (query, key) of a sequence that see each other; of a causal one, half the square, less
  what a window, or chunks, leave out.
  """
  if not spec.causal:
    return float(length * length)
  if spec.chunk is not None and spec.chunk < length:
    whole, rest = divmod(length, spec.chunk)
    return (whole * spec.chunk**2 + rest**2) / 2
  if spec.block is not None:
    return length * (length + min(spec.block, length)) / 2
  window = length if spec.window is None else min(spec.window, length)
  return window * length - window * window / 2


def _value_dim(spec: AttentionSpec) -> int:
  return spec.head_dim if spec.latent is None else spec.latent.value_dim


def matmul_parameters(spec: DecoderSpec) -> int:
  """Those that a token is multiplied by: no bias, norm or lookup, but the unembedding; of experts
  as many as a token goes through.
  """
  every = (*spec.blocks, *_further(spec))
  blocks = sum(_projections(block, spec.width, active=True) for block in every)
  further = len(_further(spec))
  joint = further * 2 * spec.width**2
  return blocks + joint + (1 + further) * spec.width * spec.vocab


def expert_flops(spec: DecoderSpec, tokens: int) -> float:
  """Those of the experts in one forward pass: a part of what `forward_flops` says of weights."""
  routed = [block.moe for block in (*spec.blocks, *_further(spec)) if block.moe is not None]
  return 2.0 * tokens * sum(moe.active * _wide(moe.expert, spec.width) for moe in routed)


def parameter_count(spec: DecoderSpec) -> int:
  """All parameters of the decoder, each once."""
  tables = spec.vocab * (1 if spec.tied else 2) + spec.positions
  blocks = sum(
    _projections(block, spec.width, active=False)
    + _biases(block, spec.width)
    + _mixer_norms(block)
    + _block_norms(block) * _norm(block.norm, spec.width)
    for block in (*spec.blocks, *_further(spec))
  )
  joint = len(_further(spec)) * (2 * spec.width**2 + 3 * _norm(spec.norm, spec.width))
  return tables * spec.width + blocks + joint + _norm(spec.norm, spec.width)


def _further(spec: DecoderSpec) -> tuple[BlockSpec, ...]:
  """The blocks of multi-token prediction, each of which has a projection and three norms besides,
  and multiplies by the unembedding too.
  """
  return () if spec.mtp is None else (spec.mtp.block,) * spec.mtp.layers


def _block_norms(block: BlockSpec) -> int:
  """How many norms stand before and after a block's two parts."""
  return 2 * block.pre_norm + block.post_attention_norm + block.post_mlp_norm


def _projections(block: BlockSpec, width: int, active: bool) -> int:
  """Weights of a block's projections: query, key, value, out; up (and gate), down; and a router's.
  With `active` of experts only those that a token goes through.
  """
  mixing = attention_weights(block, width)
  if (moe := block.moe) is None:
    return mixing + _wide(block.mlp, width)
  experts = (moe.active if active else moe.experts) * _wide(moe.expert, width)
  routing = width * (moe.experts + moe.shared_gate)
  return mixing + routing + experts + _wide(moe.shared, width)


def attention_weights(block: BlockSpec, width: int) -> int:
  """Weights of the projections of a block's attention, or of its delta net."""
  mixer = block.mixer
  return _delta(mixer, width) if isinstance(mixer, DeltaSpec) else _heads(mixer, width)


def _wide(mlp: MlpSpec | None, width: int) -> int:
  return 0 if mlp is None else width * (len(mlp.activations) + 1) * mlp.hidden


def _delta(spec: DeltaSpec, width: int) -> int:
  """Weights of a delta net's projections and of its convolution."""
  keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim
  projected = width * (2 * keys + 2 * values + 2 * spec.value_heads) + values * width
  return projected + spec.conv * spec.key_heads * spec.channels


def _heads(spec: AttentionSpec, width: int) -> int:
  """Weights of an attention layer's projections."""
  if (low := spec.latent) is None:
    queries = spec.heads * (3 if spec.gate else 2)  # out has as many as the queries
    return width * (queries + spec.kv_heads * spec.kv_projections) * spec.head_dim
  queries = spec.heads * spec.head_dim
  queries = width * queries if low.q_rank is None else low.q_rank * (width + queries)
  down = width * (low.kv_rank + low.rope_dim)
  up = low.kv_rank * spec.heads * (low.nope_dim + low.value_dim)
  return queries + down + up + spec.heads * low.value_dim * width


def _biases(block: BlockSpec, width: int) -> int:
  mixer, moe = block.mixer, block.moe
  mixing = 0 if isinstance(mixer, DeltaSpec) else _attention_biases(mixer, width)
  if moe is None:
    return mixing + _wide_biases(block.mlp, width)
  each = _wide_biases(moe.expert, width) + moe.router_bias + moe.choice_bias
  return mixing + moe.experts * each + _wide_biases(moe.shared, width)


def _wide_biases(mlp: MlpSpec | None, width: int) -> int:
  return 0 if mlp is None else mlp.bias * (len(mlp.activations) * mlp.hidden + width)


def _attention_biases(spec: AttentionSpec, width: int) -> int:
  groups = spec.kv_heads * spec.kv_projections
  heads = (spec.heads * (2 if spec.gate else 1) + groups) * spec.head_dim
  if (low := spec.latent) is not None:
    heads = low.bias * (low.kv_rank + low.rope_dim + (low.q_rank or 0))
  else:
    heads *= spec.bias
  out = spec.bias if spec.out_bias is None else spec.out_bias
  return heads + out * width + spec.sink * spec.heads


def _mixer_norms(block: BlockSpec) -> int:
  """Weights of the norms inside attention, or of a delta net's norm and decays."""
  spec = block.mixer
  if isinstance(spec, DeltaSpec):
    return spec.value_dim + 2 * spec.value_heads
  if spec.latent is not None:
    ranks = (spec.latent.kv_rank, spec.latent.q_rank or 0)
    return sum(_norm(spec.latent.norm, rank) for rank in ranks)
  whole = spec.qk_norm is not None and spec.qk_norm.whole
  made = spec.takes is None
  heads = spec.heads + made * spec.kv_heads if whole else 1 + made
  return _norm(spec.qk_norm, heads * spec.head_dim) + _norm(spec.v_norm, spec.head_dim)


def _norm(spec: NormSpec | None, width: int) -> int:
  if spec is None or spec.kind == "l2":
    return 0
  return width * (2 if spec.kind == "layer" else 1)
