"""Compile a llama step written by hand for the slices of the recipes, and ours beside it.

  python scripts/plain_pod.py [RECIPE ...]

What one would write first for a pod: JAX, optax and the library's splash kernel, weights split by
their width over all chips, the compiler left to place all else. It has the rows, the precision, the
remat policy and the compiler's options of the recipe. Both are compiled without a TPU, of the extra
`tpu`, and read by the same means; what is printed is ours, theirs, and ours as a share of theirs.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from typing import Any

import hardware_table
import jax
import jax.numpy as jnp
import optax
from baseline_step import Size, init, rms, rotate
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxtext import config, hlo, topology
from maxtext.compiled.report import wire_bytes
from maxtext.compiled.schedule import profile

SIZES = {
  "llama3.1-8b": Size(4096, 32, 32, 8, 128, 14336, 128256),
  "llama3.1-70b": Size(8192, 80, 64, 8, 128, 28672, 128256),
  "llama2-70b": Size(8192, 80, 64, 8, 128, 28672, 32000),
}
KEPT = {  # what the recipes' policies keep
  "full": (),
  "save_qkv_proj": ("query", "key", "value"),
  "minimal_with_context": ("query", "key", "value", "context", "out", "gate", "up", "down"),
}
PIECES = 4  # of the loss
ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, 0.9, 0.95, weight_decay=0.1))


def attend(mesh: Mesh, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal attention of each chip's own rows: q [b t h k], k and v [b t g k] -> [b t h k]."""

  def own(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    mask = splash.MultiHeadMask([splash.CausalMask((q.shape[1],) * 2)] * q.shape[2])
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    rows = (jnp.einsum("bthk->bhtk", x) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.einsum("bhtk->bthk", jax.vmap(kernel)(*rows))

  return jax.shard_map(own, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)(
    q, k, v
  )


def layer(mesh: Mesh, x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
  """x [b t d] -> [b t d], in bfloat16."""
  p = jax.tree.map(lambda w: w.astype(x.dtype), p)
  norm = lambda x, scale: rms(x.astype(jnp.float32), scale).astype(x.dtype)
  turn = lambda x: rotate(x.astype(jnp.float32)).astype(x.dtype)
  y = norm(x, p["norm_1"])
  q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in ("query", "key", "value"))
  q, k, v = (checkpoint_name(x, n) for x, n in ((turn(q), "query"), (turn(k), "key"), (v, "value")))
  y = checkpoint_name(attend(mesh, q, k, v), "context")
  x = x + checkpoint_name(jnp.einsum("bthk,hkd->btd", y, p["out"]), "out")
  y = norm(x, p["norm_2"])
  gate, up = checkpoint_name(y @ p["gate"], "gate"), checkpoint_name(y @ p["up"], "up")
  x = x + checkpoint_name((jax.nn.silu(gate) * up) @ p["down"], "down")
  return lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp")))


def loss(mesh: Mesh, kept: tuple[str, ...], params: Any, tokens: jax.Array, targets: jax.Array):
  """tokens and targets [b t] -> mean cross entropy, the length in pieces."""
  policy = jax.checkpoint_policies.save_only_these_names(*kept)
  body = jax.checkpoint(functools.partial(layer, mesh), policy=policy, prevent_cse=False)
  x = params["embed"].astype(jnp.bfloat16)[tokens]
  x = lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp")))
  x, _ = lax.scan(lambda x, p: (body(x, p), None), x, params["layers"])
  x = rms(x.astype(jnp.float32), params["norm"]).astype(jnp.bfloat16)

  @jax.checkpoint
  def piece(x: jax.Array, targets: jax.Array) -> jax.Array:
    logits = (x @ params["unembed"].astype(x.dtype)).astype(jnp.float32)
    hit = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - hit).sum()

  cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], PIECES, -1, *x.shape[2:]), 1, 0)
  total, _ = lax.scan(lambda s, part: (s + piece(*part), None), 0.0, (cut(x), cut(targets)))
  return total / targets.size


def theirs(name: str) -> dict[str, float]:
  """The step by hand, with what the recipe of this name says."""
  path = str(hardware_table.RECIPES / f"{name}.yml")
  loaded = config.load([path, "hardware=tpu"], {}, purpose="launch")
  machine = topology.parse(loaded.compile.compile_topology)
  topology.prepare(machine, os.environ)
  devices = topology.devices(machine, 1)
  from jax.experimental import mesh_utils

  mesh = Mesh(mesh_utils.create_device_mesh((len(devices),), devices), ("fsdp",))
  kept = KEPT[loaded.memory.remat_policy]
  size = SIZES[loaded.run.model_name]
  rows, length = loaded.training.global_batch(mesh.size), loaded.training.max_target_length

  def step(params: Any, moments: Any, tokens: jax.Array, targets: jax.Array):
    value, grads = jax.value_and_grad(functools.partial(loss, mesh, kept))(params, tokens, targets)
    updates, moments = ADAMW.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, value

  def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    split = [None] * len(x.shape)
    if size.width in x.shape and len(x.shape) > 1:
      split[x.shape.index(size.width)] = "fsdp"
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*split)))

  params = jax.eval_shape(functools.partial(init, size=size), jax.random.key(0))
  state = jax.tree.map(placed, (params, jax.eval_shape(ADAMW.init, params)))
  batch = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
  begun = time.process_time()
  options = loaded.compile.options(devices[0].device_kind)
  out = (*jax.tree.map(lambda x: x.sharding, state), None)
  jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out, compiler_options=options)
  compiled = jitted.lower(*state, batch, batch).compile()
  text = compiled.as_text()
  walked = profile(text)
  sent = hlo.collectives(text, {"fsdp": mesh.size})
  return {
    "peak GiB": (walked.peak + compiled.memory_analysis().argument_size_in_bytes) / 2**30,
    "M cycles": walked.cycles / 1e6,
    "GiB sent": sum(one.times * wire_bytes(one) for one in sent) / 2**30,
    "CPU s": time.process_time() - begun,
  }


def ours(name: str) -> dict[str, float]:
  report = hardware_table.compiled(name, [])
  return {
    "peak GiB": report["memory"]["peak"] / 2**30,
    "M cycles": report["work"]["cycles"] / 1e6,
    "GiB sent": sum(one["wire"] for one in report["sent"]) / 2**30,
    "CPU s": report["compile_cpu_seconds"],
  }


def main() -> None:
  dense = [name for name in hardware_table.recipes() if name.startswith(tuple(SIZES))]
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(dense))
  names = parser.parse_args().recipes or dense
  if unknown := set(names) - set(dense):
    parser.error(f"{unknown.pop()!r} is none of {', '.join(dense)}")
  jax.config.update("jax_platforms", "cpu")  # that no TPU is looked for
  for name in names:
    mine, other = ours(name), theirs(name)
    cells = (
      f"{what} {mine[what]:,.1f} / {other[what]:,.1f} = {mine[what] / other[what]:.3f}"
      for what in mine
    )
    print(f"{name}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
  main()
