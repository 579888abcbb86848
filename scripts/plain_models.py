"""Transformers written by hand, as one would first: plain JAX and the kernels that come with it.

Weights are stacked for a scan over layers and split by their width over the mesh's one axis; the
compiler places all else, but for two things that it cannot split, in which each chip has its own
rows: the splash kernel, with windows and sinks, and experts. For these a chip gathers the weights
of all of a layer's experts, sorts its rows by the expert that they choose, multiplies them by the
megablox kernel of the library with the library's own gradient, and sorts them back; it drops none.
Matrices are cast to bfloat16 before they are gathered, and so are their gradients when they are
added up. Rotary timescales and norms' offsets are the same everywhere: they cost nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from baseline_step import rms, rotate
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PIECES = 4  # of the loss
SIDE = 512  # of the blocks of experts' products
AXIS = "fsdp"  # of the mesh
Weights = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage:
  """Layers that repeat: the attention window of each of a period, and its feed-forward part."""

  repeat: int
  hidden: int
  windows: tuple[int | None, ...] = (None,)
  experts: int = 0
  active: int = 0


@dataclasses.dataclass(frozen=True)
class Latent:
  """Ranks by way of which queries, keys and values are made, and each key's shared channels."""

  query: int
  both: int
  rotated: int


@dataclasses.dataclass(frozen=True)
class Model:
  """Sizes, and what a model has besides: norms of queries and keys, norms after each part, biases
  of all products with an attention sink in each head and experts whose gates are cut, multi-head
  latent attention, a shared expert with a choice among groups of experts.
  """

  width: int
  heads: int
  kv_heads: int
  head_dim: int
  vocab: int
  stages: tuple[Stage, ...]
  qk_norm: bool = False
  post_norms: bool = False
  biased: bool = False
  gelu: bool = False
  tied: bool = False
  latent: Latent | None = None
  groups: int = 0  # of which half are chosen

  def letters(self, stage: Stage) -> dict[str, str]:
    """The dimensions of a layer's weights, each a letter of `sizes`."""
    found = {"norm_1": "d", "norm_2": "d", "out": "hkd", "gate": "df", "up": "df", "down": "fd"}
    if self.latent:
      found |= {"query_down": "dq", "query_norm": "q", "query_up": "qhx"}
      found |= {"latent_down": "dy", "latent_norm": "r", "latent_up": "rhz"}
    else:
      found |= {"query": "dhk", "key": "dgk", "value": "dgk"}
    if stage.experts:
      found |= {"router": "de", "gate": "edf", "up": "edf", "down": "efd"}
    if stage.experts and self.groups:
      found |= {"router_bias": "e", "shared_gate": "df", "shared_up": "df", "shared_down": "fd"}
    if self.qk_norm:
      found |= {"query_norm": "k", "key_norm": "k"}
    if self.post_norms:
      found |= {"norm_3": "d", "norm_4": "d"}
    if self.biased:
      found |= {"query_bias": "hk", "key_bias": "gk", "value_bias": "gk", "out_bias": "d"}
      found |= {"sinks": "h", "router_bias": "e"}
      found |= {"gate_bias": "ef", "up_bias": "ef", "down_bias": "ed"}
    return found

  def shapes(self, stage: Stage) -> dict[str, tuple[int, ...]]:
    """Those of a layer's weights."""
    sizes = {"d": self.width, "h": self.heads, "g": self.kv_heads, "k": self.head_dim}
    sizes |= {"f": stage.hidden, "e": stage.experts, "z": 2 * self.head_dim}
    if low := self.latent:
      sizes |= {"q": low.query, "r": low.both, "y": low.both + low.rotated}
      sizes["x"] = self.head_dim + low.rotated
    return {name: tuple(sizes[c] for c in word) for name, word in self.letters(stage).items()}


MODELS = {
  "llama3.1-8b": Model(4096, 32, 8, 128, 128256, (Stage(32, 14336),)),
  "llama3.1-70b": Model(8192, 64, 8, 128, 128256, (Stage(80, 28672),)),
  "llama2-70b": Model(8192, 64, 8, 128, 32000, (Stage(80, 28672),)),
  "mixtral-8x7b": Model(4096, 32, 8, 128, 32000, (Stage(32, 14336, experts=8, active=2),)),
  "qwen3-30b-a3b": Model(
    2048, 32, 4, 128, 151936, (Stage(48, 768, experts=128, active=8),), qk_norm=True
  ),
  "gpt-oss-20b": Model(
    2880, 64, 8, 64, 201088, (Stage(12, 2880, (128, None), experts=32, active=4),), biased=True
  ),
  "gemma3-12b": Model(
    3840,
    16,
    8,
    256,
    262208,
    (Stage(8, 15360, (*[1024] * 5, None)),),
    qk_norm=True,
    post_norms=True,
    gelu=True,
    tied=True,
  ),
  "deepseek3-671b": Model(
    7168,
    128,
    128,
    128,
    129280,
    (Stage(3, 18432), Stage(58, 2048, experts=256, active=8)),
    latent=Latent(1536, 512, 64),
    groups=8,
  ),
}


def init(key: jax.Array, model: Model) -> Any:
  """Normal matrices, norms of one, biases of zero; of a stage a dictionary for each of a period,
  stacked over the periods.
  """

  def draw(key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    if "norm" in name:
      return jnp.ones(shape)
    return jnp.zeros(shape) if "bias" in name else 0.02 * jax.random.normal(key, shape)

  def layers(key: jax.Array, stage: Stage) -> dict[str, jax.Array]:
    shapes = model.shapes(stage)
    keys = jax.random.split(key, len(shapes))
    return {n: draw(k, n, (stage.repeat, *s)) for k, (n, s) in zip(keys, shapes.items())}

  ends = {"embed": (model.vocab, model.width), "norm": (model.width,)}
  ends |= {} if model.tied else {"unembed": (model.width, model.vocab)}
  params: Any = {
    name: draw(jax.random.fold_in(key, i), name, shape)
    for i, (name, shape) in enumerate(ends.items())
  }
  params["stages"] = [
    [layers(jax.random.fold_in(key, 100 * (1 + i) + j), stage) for j in range(len(stage.windows))]
    for i, stage in enumerate(model.stages)
  ]
  return params


def split(word: str) -> P:
  """How a weight of these dimensions is split: by its width, else by the rank it is expanded of."""
  split_by = next((c for c in "dqr" if c in word), None)
  return P(*(AXIS if c == split_by else None for c in word))


def places(mesh: Mesh, model: Model) -> Any:
  """The shardings of what `init` makes."""
  put = lambda *spec: NamedSharding(mesh, P(*spec))
  found: Any = {"embed": put(None, AXIS), "norm": put()}
  found |= {} if model.tied else {"unembed": put(AXIS, None)}
  found["stages"] = [
    [{n: put(None, *split(w)) for n, w in model.letters(stage).items()} for _ in stage.windows]
    for stage in model.stages
  ]
  return found


def interpreted(mesh: Mesh) -> bool:
  """Whether kernels have no chip that they run on, and are run as programs."""
  return mesh.devices.flat[0].platform != "tpu"


def attend(
  mesh: Mesh, window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, *sinks: jax.Array
) -> jax.Array:
  """Causal attention of each chip's own rows: q [b t h k], k and v [b t g k] -> [b t h k]."""

  def own(q: jax.Array, k: jax.Array, v: jax.Array, *sinks: jax.Array) -> jax.Array:
    square = (q.shape[1],) * 2
    one = splash.LocalMask(square, (window - 1, 0), 0) if window else splash.CausalMask(square)
    mask = splash.MultiHeadMask([one] * q.shape[2])
    kernel = splash.make_splash_mha(
      mask, head_shards=1, q_seq_shards=1, interpret=interpreted(mesh)
    )
    rows = (jnp.einsum("bthk->bhtk", x) for x in (q * q.shape[-1] ** -0.5, k, v))
    y = jax.vmap(lambda q, k, v: kernel(q, k, v, None, *sinks))(*rows)
    return jnp.einsum("bhtk->bthk", y)

  specs = (*[P(AXIS)] * 3, *[P()] * len(sinks))
  return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)(
    q, k, v, *sinks
  )


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
  """In float32, of the last axis."""
  return rms(x.astype(jnp.float32), scale).astype(x.dtype)


def turn(x: jax.Array) -> jax.Array:
  """x [b t h k] with rotary positions, found in float32."""
  return rotate(x.astype(jnp.float32)).astype(x.dtype)


def projected(model: Model, y: jax.Array, p: Weights) -> tuple[jax.Array, ...]:
  """y [b t d] -> queries [b t h k], keys and values [b t g k]."""
  q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in ("query", "key", "value"))
  if model.biased:
    q, k, v = q + p["query_bias"], k + p["key_bias"], v + p["value_bias"]
  if model.qk_norm:
    q, k = norm(q, p["query_norm"]), norm(k, p["key_norm"])
  return turn(q), turn(k), v


def expanded(model: Model, y: jax.Array, p: Weights) -> tuple[jax.Array, ...]:
  """y [b t d] -> queries and keys, whose last channels are rotated, and values, by way of ranks."""
  assert model.latent
  q = jnp.einsum("btq,qhx->bthx", norm(y @ p["query_down"], p["query_norm"]), p["query_up"])
  own, turned = jnp.split(q, [model.head_dim], -1)
  q = jnp.concatenate([own, turn(turned)], -1)
  latent, shared = jnp.split(y @ p["latent_down"], [model.latent.both], -1)
  both = jnp.einsum("btr,rhz->bthz", norm(latent, p["latent_norm"]), p["latent_up"])
  k, v = jnp.split(both, 2, -1)
  shared = jnp.broadcast_to(turn(shared[:, :, None]), (*k.shape[:3], shared.shape[-1]))
  return q, jnp.concatenate([k, shared], -1), v


def attention(mesh: Mesh, model: Model, window: int | None, y: jax.Array, p: Weights) -> jax.Array:
  """y [b t d] -> [b t d]."""
  q, k, v = expanded(model, y, p) if model.latent else projected(model, y, p)
  q, k, v = (checkpoint_name(x, n) for x, n in ((q, "query"), (k, "key"), (v, "value")))
  sinks = (p["sinks"],) if model.biased else ()
  y = checkpoint_name(attend(mesh, window, q, k, v, *sinks), "context")
  y = jnp.einsum("bthk,hkd->btd", y, p["out"])
  return checkpoint_name(y + p["out_bias"] if model.biased else y, "out")


def activated(model: Model, gate: jax.Array, up: jax.Array) -> jax.Array:
  if model.biased:
    gate, up = jnp.minimum(gate, 7), jnp.clip(up, -7, 7)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
  return (jax.nn.gelu if model.gelu else jax.nn.silu)(gate) * up


def mlp(model: Model, y: jax.Array, p: Weights, kind: str = "") -> jax.Array:
  """y [b t d] -> [b t d]; the weights' names begin with `kind`."""
  gate, up = (checkpoint_name(y @ p[kind + name], name) for name in ("gate", "up"))
  return checkpoint_name(activated(model, gate, up) @ p[kind + "down"], "down")


def chosen_of(model: Model, active: int, x: jax.Array, p: Weights) -> tuple[jax.Array, jax.Array]:
  """x [n d] -> the experts of each token and how much each counts [n k], float32."""
  logits = x.astype(jnp.float32) @ p["router"]
  if not model.groups:
    best, chosen = lax.top_k(logits + p["router_bias"] if model.biased else logits, active)
    return chosen, jax.nn.softmax(best)
  scores = jax.nn.sigmoid(logits)
  ranks = lax.stop_gradient(scores + p["router_bias"])
  grouped = ranks.reshape(len(ranks), model.groups, -1)
  _, groups = lax.top_k(lax.top_k(grouped, 2)[0].sum(-1), model.groups // 2)
  allowed = jax.nn.one_hot(groups, model.groups, dtype=bool).any(1)
  _, chosen = lax.top_k(
    jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(ranks.shape), active
  )
  best = jnp.take_along_axis(scores, chosen, -1)
  return chosen, 2.5 * best / best.sum(-1, keepdims=True)


def mixture(mesh: Mesh, model: Model, stage: Stage, y: jax.Array, p: Weights) -> jax.Array:
  """y [b t d] -> [b t d]: each chip's own rows through all of its layer's experts."""
  words = model.letters(stage)
  names = [n for n in words if n.partition("_")[0] in ("router", "gate", "up", "down")]

  def own(y: jax.Array, parts: Weights) -> jax.Array:
    p = {
      n: lax.all_gather(w, AXIS, axis=words[n].index("d"), tiled=True) if "d" in words[n] else w
      for n, w in parts.items()
    }
    x = y.reshape(y.shape[0] * y.shape[1], y.shape[2])
    chosen, share = chosen_of(model, stage.active, x, p)
    order = jnp.argsort(chosen.reshape(chosen.size))
    expert = chosen.reshape(chosen.size)[order]
    sizes = jnp.bincount(expert, length=stage.experts).astype(jnp.int32)

    def product(x: jax.Array, name: str) -> jax.Array:
      side = min(SIDE, *x.shape, p[name].shape[2])
      y = gmm(x, p[name], sizes, x.dtype, (side,) * 3, interpret=interpreted(mesh))
      return y + p[f"{name}_bias"][expert] if model.biased else y

    rows = x[order // stage.active]
    gate, up = (checkpoint_name(product(rows, name), name) for name in ("gate", "up"))
    made = product(activated(model, gate, up), "down")
    made = made[jnp.argsort(order)].reshape(*chosen.shape, made.shape[-1])
    return jnp.einsum("nkd,nk->nd", made, share.astype(made.dtype)).reshape(y.shape)

  specs = (P(AXIS), {name: split(words[name]) for name in names})
  by_chip = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)
  return checkpoint_name(by_chip(y, {name: p[name] for name in names}), "down")


def layer(
  mesh: Mesh, model: Model, stage: Stage, window: int | None, x: jax.Array, p: Weights
) -> jax.Array:
  """x [b t d] -> [b t d], in bfloat16; routers are float32."""
  p = {name: w if "router" in name else w.astype(x.dtype) for name, w in p.items()}
  y = attention(mesh, model, window, norm(x, p["norm_1"]), p)
  x = x + (norm(y, p["norm_3"]) if model.post_norms else y)
  y = norm(x, p["norm_2"])
  shared = mlp(model, y, p, "shared_") if stage.experts and model.groups else 0
  y = mixture(mesh, model, stage, y, p) + shared if stage.experts else mlp(model, y, p)
  x = x + (norm(y, p["norm_4"]) if model.post_norms else y)
  return lax.with_sharding_constraint(x, NamedSharding(mesh, P(AXIS)))


def repeated(
  mesh: Mesh,
  model: Model,
  stage: Stage,
  kept: tuple[str, ...],
  x: jax.Array,
  stacked: list[Weights],
) -> jax.Array:
  """x [b t d] -> [b t d] through all layers of a stage, with what is `kept` of each."""
  policy = jax.checkpoint_policies.save_only_these_names(*kept)
  bodies = [
    jax.checkpoint(
      functools.partial(layer, mesh, model, stage, window), policy=policy, prevent_cse=False
    )
    for window in stage.windows
  ]

  def period(x: jax.Array, weights: list[Weights]) -> tuple[jax.Array, None]:
    for body, p in zip(bodies, weights):
      x = body(x, p)
    return x, None

  return lax.scan(period, x, stacked)[0]


def loss(
  mesh: Mesh,
  model: Model,
  kept: tuple[str, ...],
  params: Any,
  tokens: jax.Array,
  targets: jax.Array,
) -> jax.Array:
  """tokens and targets [b t] -> mean cross entropy, the length in pieces."""
  x = params["embed"].astype(jnp.bfloat16)[tokens]
  x = x * model.width**0.5 if model.tied else x
  x = lax.with_sharding_constraint(x, NamedSharding(mesh, P(AXIS)))
  for stage, stacked in zip(model.stages, params["stages"]):
    x = repeated(mesh, model, stage, kept, x, stacked)
  x = norm(x, params["norm"])

  @jax.checkpoint
  def piece(x: jax.Array, targets: jax.Array) -> jax.Array:
    last = params["embed"].T if model.tied else params["unembed"]
    logits = (x @ last.astype(x.dtype)).astype(jnp.float32)
    hit = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - hit).sum()

  cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], PIECES, -1, *x.shape[2:]), 1, 0)
  total, _ = lax.scan(lambda s, part: (s + piece(*part), None), 0.0, (cut(x), cut(targets)))
  return total / targets.size
