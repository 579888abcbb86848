"""Compile a step written by hand for the slices of the recipes, and ours beside it.

  python scripts/plain_pod.py [RECIPE ...]

What one would write first for a pod: the models of plain_models.py and optax, weights split by
their width over all chips. It has the rows, the precision, the remat policy and the compiler's
options of the recipe. Both are compiled without a TPU, of the extra `tpu`, and read by the same
means; what is printed is ours, theirs, and ours as a share of theirs.
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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from plain_models import AXIS, MODELS, Model, init, loss, places

from maxtext import config, estimate, hlo, topology
from maxtext.compiled.report import wire_bytes
from maxtext.compiled.schedule import profile

KEPT = {  # what the recipes' policies keep
  "full": (),
  "save_qkv_proj": ("query", "key", "value"),
  "minimal_with_context": ("query", "key", "value", "context", "out", "gate", "up", "down"),
}
ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, 0.9, 0.95, weight_decay=0.1))


def theirs(name: str) -> dict[str, float]:
  """The step by hand, with what the recipe of this name says."""
  path = str(hardware_table.RECIPES / f"{name}.yml")
  loaded = config.load([path, "hardware=tpu"], {}, purpose="launch")
  machine = topology.parse(loaded.compile.compile_topology)
  topology.prepare(machine, os.environ)
  devices = topology.devices(machine, 1)
  from jax.experimental import mesh_utils

  mesh = Mesh(mesh_utils.create_device_mesh((len(devices),), devices), (AXIS,))
  kept, model = KEPT[loaded.memory.remat_policy], MODELS[loaded.run.model_name]
  rows, length = loaded.training.global_batch(mesh.size), loaded.training.max_target_length

  def step(params: Any, moments: Any, tokens: jax.Array, targets: jax.Array):
    found = functools.partial(loss, mesh, model, kept)
    value, grads = jax.value_and_grad(found)(params, tokens, targets)
    updates, moments = ADAMW.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, value

  state = placed_state(mesh, model)
  batch = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=NamedSharding(mesh, P(AXIS)))
  begun = time.process_time()
  options = loaded.compile.options(devices[0].device_kind)
  out = (*jax.tree.map(lambda x: x.sharding, state), None)
  jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out, compiler_options=options)
  compiled = jitted.lower(*state, batch, batch).compile()
  text = compiled.as_text()
  sent, peak = hlo.collectives(text, {AXIS: mesh.size}), estimate.compiled_bytes(compiled)
  assert peak  # the TPU's compiler always says
  return {
    "B parameters": sum(x.size for x in jax.tree.leaves(state[0])) / 1e9,
    "peak GiB": peak / 2**30,
    "M cycles": profile(text).cycles / 1e6,
    "GiB sent": sum(one.times * wire_bytes(one) for one in sent) / 2**30,
    "CPU s": time.process_time() - begun,
  }


def placed_state(mesh: Mesh, model: Model) -> tuple[Any, Any]:
  """The shapes of parameters and moments, and where each is."""
  place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
  where, everywhere = places(mesh, model), NamedSharding(mesh, P())
  params = jax.eval_shape(functools.partial(init, model=model), jax.random.key(0))
  moments = optax.tree_utils.tree_map_params(
    ADAMW,
    place,
    jax.eval_shape(ADAMW.init, params),
    where,
    transform_non_params=lambda x: place(x, everywhere),
  )
  return jax.tree.map(place, params, where), moments


def ours(name: str) -> dict[str, float]:
  report = hardware_table.compiled(name, [])
  return {
    "B parameters": report["run"]["parameters"] / 1e9,
    "peak GiB": report["memory"]["peak"] / 2**30,
    "M cycles": report["work"]["cycles"] / 1e6,
    "GiB sent": sum(one["wire"] for one in report["sent"]) / 2**30,
    "CPU s": report["compile_cpu_seconds"],
  }


def main() -> None:
  known = [name for name in hardware_table.recipes() if name.startswith(tuple(MODELS))]
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(known))
  names = parser.parse_args().recipes or known
  if unknown := set(names) - set(known):
    parser.error(f"{unknown.pop()!r} is none of {', '.join(known)}")
  jax.config.update("jax_platforms", "cpu")  # that no TPU is looked for
  for name in names:
    mine, other = ours(name), theirs(name)
    cells = (
      f"{what} {mine[what]:,.2f} / {other[what]:,.2f} = {mine[what] / other[what]:.3f}"
      for what in mine
    )
    print(f"{name}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
  main()
