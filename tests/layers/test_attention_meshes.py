"""Every kind of attention layer gives on a mesh what it gives on one device, with its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from maxtext import config, sharding
from maxtext.layers.grouped import GroupedAttention
from maxtext.layers.latent import LatentAttention
from maxtext.layers.params import Compute
from maxtext.masks import Mask
from maxtext.specs import AttentionSpec, LatentSpec, NormSpec, QkNormSpec

WIDTH, ROWS = 64, 8
SPECS = {
  "plain": AttentionSpec(4, 2, 16, bias=True, window=5),
  "fused": AttentionSpec(4, 2, 16, fused=True, soft_cap=2.0),
  "gate": AttentionSpec(4, 2, 16, gate=True, sink=True, qk_norm=QkNormSpec(whole=True)),
  "shared values": AttentionSpec(4, 2, 16, share_kv=True, v_norm=NormSpec("l2"), chunk=3),
  "latent": AttentionSpec(4, 4, 24, latent=LatentSpec(24, 16, 8, 16)),
  "latent queries": AttentionSpec(4, 4, 24, latent=LatentSpec(24, 16, 8, 16, q_rank=16)),
}
MESHES = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2})
RULES = config.load([], {}).mesh.logical_axis_rules


def layout_of(sizes):
  devices = np.array(jax.devices()[:8]).reshape(list(sizes.values()))
  mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
  rules = {name: tuple(a for a in axes if a in sizes) for name, axes in RULES.items()}
  return sharding.Layout(mesh, sharding.Rules(rules))


def differentiate(spec, length, layout):
  """The outputs of a layer, and the gradients by its inputs and by every parameter."""
  kind = LatentAttention if spec.latent else GroupedAttention
  graph, params = nnx.split(kind(spec, WIDTH, Compute(kernel="dot_product"), nnx.Rngs(0)))
  random = np.random.default_rng(0)
  x, weight = (
    jnp.asarray(random.normal(size=(ROWS, length, WIDTH)), jnp.float32) for _ in range(2)
  )
  mask = Mask.of(jnp.broadcast_to(jnp.arange(length), (ROWS, length)))
  axes = jax.tree.map(
    lambda p: p.get_metadata()["axes"], params, is_leaf=lambda p: isinstance(p, nnx.Variable)
  )

  def loss(x, params):
    with sharding.use(layout):
      params = jax.tree.map(
        lambda p, names: p.replace(sharding.constrain(p[...], *names)),
        params,
        axes,
        is_leaf=lambda p: isinstance(p, nnx.Variable),
      )
      x = sharding.constrain(x, "activation_batch", "activation_length", "activation_embed")
      y, _ = nnx.merge(graph, params)(x, mask)
      return (y * weight).sum(), y

  (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, params)
  return y, *jax.tree.leaves(grads)


@pytest.mark.parametrize("length", [1, 16])
@pytest.mark.parametrize("name", SPECS)
def test_a_mesh_changes_no_number(name, length):
  truth = differentiate(SPECS[name], length, None)
  for sizes in MESHES:
    found = differentiate(SPECS[name], length, layout_of(sizes))
    for ours, theirs in zip(found, truth, strict=True):
      scale = max(1.0, float(np.abs(theirs).max()))
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * scale, err_msg=str(sizes))
