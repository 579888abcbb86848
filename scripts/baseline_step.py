"""A train step of a small llama in plain JAX, by hand: what the real step is measured against.

  python scripts/baseline_step.py [--style plain|tuned] [--remat none|saved|full] [--rounds 5]

No framework, one file, one device: dictionaries of arrays, adamw, a donated state. `plain` is what
one would write first; `tuned` is the fastest we know how to make such a step on a CPU: attention in
tiles below the diagonal, one product for both halves of the gated MLP, the loss's gradient found
tile by tile with the loss, and a scan that keeps the products' results and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from race import race

Params = dict[str, Any]
State = tuple[Params, Params, Params, jax.Array]  # parameters, both moments, count
TILE = 128  # queries at a time
LOSS_TILE = 256  # tokens at a time


@dataclasses.dataclass(frozen=True)
class Size:
  """The benchmark model: 58 million parameters, 2048 tokens a step."""

  width: int = 512
  layers: int = 8
  heads: int = 8
  kv_heads: int = 4
  head_dim: int = 64
  mlp: int = 1536
  vocab: int = 32000
  length: int = 512
  rows: int = 4


@dataclasses.dataclass(frozen=True)
class Style:
  """How the same mathematics is written; remat 'saved' keeps the results of products only."""

  scan: bool = True
  remat: str = "full"
  tiled_attention: bool = False
  tiled_loss: bool = False
  joined_mlp: bool = False


STYLES = {
  "plain": Style(),
  "tuned": Style(remat="saved", tiled_attention=True, tiled_loss=True, joined_mlp=True),
}


def init(key: jax.Array, size: Size) -> Params:
  """Normal weights; the layers are stacked."""
  n, d, h, g, k, f = size.layers, size.width, size.heads, size.kv_heads, size.head_dim, size.mlp
  shapes = {
    "query": (n, d, h, k),
    "key": (n, d, g, k),
    "value": (n, d, g, k),
    "out": (n, h, k, d),
    "gate": (n, d, f),
    "up": (n, d, f),
    "down": (n, f, d),
    "embed": (size.vocab, d),
    "unembed": (d, size.vocab),
  }
  keys = jax.random.split(key, len(shapes))
  params = {name: 0.02 * jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items())}
  layers = {name: params.pop(name) for name in list(params) if "embed" not in name}
  layers |= {"norm_1": jnp.ones((n, d)), "norm_2": jnp.ones((n, d))}
  return params | {"layers": layers, "norm": jnp.ones(d)}


def init_state(key: jax.Array, size: Size) -> State:
  params = init(key, size)
  zeros = lambda: jax.tree.map(jnp.zeros_like, params)
  return params, zeros(), zeros(), jnp.zeros((), jnp.int32)


def rms(x: jax.Array, scale: jax.Array) -> jax.Array:
  return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def rotate(x: jax.Array) -> jax.Array:
  """Rotary positions on x [b t h k]."""
  half = x.shape[-1] // 2
  angle = jnp.arange(x.shape[1])[:, None, None] * 1e4 ** -(jnp.arange(half) / half)
  a, b = jnp.split(x, 2, -1)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend_plainly(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal attention with all scores: q [b t h k], k and v [b t g k] -> [b t h k]."""
  b, t, h, d = q.shape
  q = q.reshape(b, t, k.shape[2], h // k.shape[2], d)
  x = jnp.einsum("btgrk,bsgk->bgrts", q, k) * d**-0.5
  x = jnp.where(jnp.tril(jnp.ones((t, t), bool)), x, -1e30)
  y = jnp.einsum("bgrts,bsgk->btgrk", jax.nn.softmax(x, -1), v)
  return y.reshape(b, t, h, d)


def _tiles(t: int):
  return [(i, min(i + TILE, t)) for i in range(0, t, TILE)]


def _scores(q: jax.Array, k: jax.Array, start: int) -> jax.Array:
  """q [r t k] from position `start` on, k [s k] -> masked scores [r t s]."""
  seen = start + jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[0])
  return jnp.where(seen, jnp.einsum("rtk,sk->rts", q, k) * q.shape[-1] ** -0.5, -1e30)


@jax.custom_vjp
def attend_in_tiles(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """The same in tiles, none of them above the diagonal; one group of heads after the other."""
  return _attend_forward(q, k, v)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array):
  b, t, h, d = q.shape
  g = k.shape[2]
  queries = jnp.einsum("btgrk->bgrtk", q.reshape(b, t, g, h // g, d)).reshape(b * g, h // g, t, d)
  keys, values = (jnp.einsum("bsgk->bgsk", x).reshape(b * g, t, d) for x in (k, v))

  def group(_, part):
    q, k, v = part
    outs, norms = [], []
    for i, j in _tiles(t):
      x = _scores(q[:, i:j], k[:j], i)
      top = x.max(-1, keepdims=True)
      weights = jnp.exp(x - top)
      total = weights.sum(-1, keepdims=True)
      outs.append(jnp.einsum("rts,sk->rtk", weights, v[:j]) / total)
      norms.append(jnp.log(total) + top)
    return None, (jnp.concatenate(outs, 1), jnp.concatenate(norms, 1))

  _, (out, norm) = lax.scan(group, None, (queries, keys, values))
  out, norm = checkpoint_name(out, "kept"), checkpoint_name(norm, "kept")
  y = jnp.einsum("bgrtk->btgrk", out.reshape(b, g, h // g, t, d)).reshape(b, t, h, d)
  return y, (queries, keys, values, out, norm)


def _attend_backward(saved, dy: jax.Array):
  queries, keys, values, out, norm = saved
  b, t, h, d = dy.shape
  g = keys.shape[0] // b
  dy = jnp.einsum("btgrk->bgrtk", dy.reshape(b, t, g, h // g, d)).reshape(out.shape)

  def group(_, part):
    q, k, v, out, norm, dy = part
    share = (out * dy).sum(-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for i, j in _tiles(t):
      weights = jnp.exp(_scores(q[:, i:j], k[:j], i) - norm[:, i:j])
      dx = jnp.einsum("rtk,sk->rts", dy[:, i:j], v[:j]) - share[:, i:j]
      dx = dx * weights * d**-0.5
      dq.append(jnp.einsum("rts,sk->rtk", dx, k[:j]))
      dk = dk.at[:j].add(jnp.einsum("rts,rtk->sk", dx, q[:, i:j]))
      dv = dv.at[:j].add(jnp.einsum("rts,rtk->sk", weights, dy[:, i:j]))
    return None, (jnp.concatenate(dq, 1), dk, dv)

  _, (dq, dk, dv) = lax.scan(group, None, (queries, keys, values, out, norm, dy))
  dq = jnp.einsum("bgrtk->btgrk", dq.reshape(b, g, h // g, t, d)).reshape(b, t, h, d)
  dk, dv = (jnp.einsum("bgsk->bsgk", x.reshape(b, g, t, d)) for x in (dk, dv))
  return dq, dk, dv


attend_in_tiles.defvjp(_attend_forward, _attend_backward)


def layer(style: Style, x: jax.Array, p: Params) -> jax.Array:
  """x [b t d] -> [b t d]."""
  keep = lambda y: checkpoint_name(y, "kept")
  y = rms(x, p["norm_1"])
  q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in ("query", "key", "value"))
  q, k, v = keep(rotate(q)), keep(rotate(k)), keep(v)
  y = attend_in_tiles(q, k, v) if style.tiled_attention else attend_plainly(q, k, v)
  x = x + keep(jnp.einsum("bthk,hkd->btd", y, p["out"]))
  y = rms(x, p["norm_2"])
  if style.joined_mlp:
    gate, up = jnp.split(y @ jnp.concatenate([p["gate"], p["up"]], 1), 2, -1)
  else:
    gate, up = y @ p["gate"], y @ p["up"]
  return x + (jax.nn.silu(keep(gate)) * keep(up)) @ p["down"]


def plain_loss(x: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean cross entropy: x [n d], w [d v], targets [n]."""
  logits = x @ w
  hit = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
  return (jax.nn.logsumexp(logits, -1) - hit).mean()


@jax.custom_vjp
def tiled_loss(x: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
  """The same, its gradient computed with it, LOSS_TILE tokens at a time."""
  return _loss_forward(x, w, targets)[0]


def _loss_forward(x: jax.Array, w: jax.Array, targets: jax.Array):
  def tile(carry, part):
    total, dw = carry
    x, targets = part
    logits = x @ w
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    sums = weights.sum(-1, keepdims=True)
    hit = targets[:, None] == jnp.arange(w.shape[1])
    total += (jnp.log(sums) + top).sum() - jnp.where(hit, logits, 0).sum()
    dlogits = (weights / sums - hit) / n
    return (total, dw + x.T @ dlogits), dlogits @ w.T

  n = x.shape[0]
  parts = (x.reshape(-1, LOSS_TILE, x.shape[1]), targets.reshape(-1, LOSS_TILE))
  (total, dw), dx = lax.scan(tile, (jnp.zeros(()), jnp.zeros_like(w)), parts)
  return total / n, (dx.reshape(x.shape), dw)


def _loss_backward(saved, g: jax.Array):
  return saved[0] * g, saved[1] * g, None


tiled_loss.defvjp(_loss_forward, _loss_backward)


def loss(style: Style, params: Params, tokens: jax.Array, targets: jax.Array) -> jax.Array:
  """tokens and targets [b t] -> mean cross entropy."""
  body = functools.partial(layer, style)
  if style.remat != "none":
    names = ("kept",) if style.remat == "saved" else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    body = jax.checkpoint(body, policy=policy, prevent_cse=not style.scan)
  x = params["embed"][tokens]
  if style.scan:
    x, _ = lax.scan(lambda x, p: (body(x, p), None), x, params["layers"])
  else:
    leaves, structure = jax.tree.flatten(params["layers"])
    for weights in zip(*leaves):
      x = body(x, structure.unflatten(weights))
  x = rms(x, params["norm"]).reshape(-1, x.shape[-1])
  last = tiled_loss if style.tiled_loss else plain_loss
  return last(x, params["unembed"], targets.reshape(-1))


def train_step(style: Style, state: State, tokens: jax.Array, targets: jax.Array):
  """(state, batch) -> (state, loss): gradients shortened to norm 1, adamw at a constant rate."""
  params, first, second, count = state
  value, grads = jax.value_and_grad(functools.partial(loss, style))(params, tokens, targets)
  shorter = 1 / jnp.maximum(1, jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(grads))))
  count += 1
  first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * shorter * g, first, grads)
  second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * (shorter * g) ** 2, second, grads)
  rise, spread = 1 - 0.9**count, 1 - 0.95**count

  def update(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
    return p - 3e-4 * (m / rise / (jnp.sqrt(v / spread) + 1e-8) + 0.1 * p)

  return (jax.tree.map(update, params, first, second), first, second, count), value


def make_batch(size: Size) -> tuple[jax.Array, jax.Array]:
  """Random tokens and their successors, [b t] each."""
  tokens = jax.random.randint(jax.random.key(1), (size.rows, size.length), 0, size.vocab)
  return tokens, jnp.roll(tokens, -1, 1)


def compile_step(style: Style, size: Size):
  """The compiled (state, tokens, targets) -> (state, loss); it takes over the state's memory."""
  state = jax.eval_shape(functools.partial(init_state, size=size), jax.random.key(0))
  step = jax.jit(functools.partial(train_step, style), donate_argnums=0)
  return step.lower(state, *jax.eval_shape(functools.partial(make_batch, size))).compile()


def products(size: Size) -> float:
  """Floating-point operations of a step's products, attention counted below the diagonal."""
  s = size
  weights = s.layers * s.width * (2 * (s.heads + s.kv_heads) * s.head_dim + 3 * s.mlp)
  tokens = s.rows * s.length
  attention = 2 * s.layers * s.length * s.heads * s.head_dim
  return 3 * tokens * (2 * (weights + s.width * s.vocab) + attention)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--style", choices=STYLES, default="tuned")
  parser.add_argument("--remat", choices=["none", "saved", "full"])
  parser.add_argument("--unrolled", action="store_true")
  parser.add_argument("--rounds", type=int, default=5)
  options = parser.parse_args()
  style, size = STYLES[options.style], Size()
  style = dataclasses.replace(style, remat=options.remat or style.remat, scan=not options.unrolled)
  step, batch = compile_step(style, size), make_batch(size)
  carried = [init_state(jax.random.key(0), size)]

  def lap() -> None:
    carried[0], value = step(carried[0], *batch)
    value.block_until_ready()

  laps = race({"step": lap}, options.rounds)["step"]
  memory = step.memory_analysis()
  wall, cpu = min(laps.wall), min(laps.cpu)
  print(style)
  print(f"{wall:.2f} s, {cpu:.2f} CPU s, {products(size) / wall / 1e9:.0f} GFLOP/s of products")
  print(
    f"state {memory.argument_size_in_bytes / 2**20:.0f} MiB,"
    f" beside it {memory.temp_size_in_bytes / 2**20:.0f} MiB"
  )


if __name__ == "__main__":
  main()
