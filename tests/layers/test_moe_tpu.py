"""The TPU's compiler takes experts on each device's own tokens, with their gradients."""

import pytest

from tests.chips import FOUR, printed

COMPILE = """
  import sys
  import jax, jax.numpy as jnp, numpy as np
  from flax import nnx
  from jax.experimental import topologies
  from jax.sharding import AxisType, Mesh
  from maxtext import config, sharding
  from maxtext.layers.moe import Moe
  from maxtext.layers.params import Compute
  from maxtext.specs import MlpSpec, MoeSpec

  devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[2]).devices
  axes, grid = (sys.argv[1], "tensor"), np.array(devices).reshape(2, 2)
  mesh = Mesh(grid, axes, axis_types=(AxisType.Auto,) * 2)
  rules = config.load([], {}).mesh.logical_axis_rules
  layout = sharding.Layout(mesh, sharding.Rules({k: tuple(v) for k, v in rules.items()}))
  spec = MoeSpec(8, 2, MlpSpec(384, bias=True), normalize=True)
  build = lambda: Moe(spec, 256, Compute(dtype=jnp.dtype("bfloat16")), nnx.Rngs(0))
  graph, state = nnx.split(nnx.eval_shape(build))

  def shape(p):
    place = layout.sharding(p.get_metadata()["axes"], p.shape)
    return p.replace(jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place))

  state = jax.tree.map(shape, state, is_leaf=lambda p: isinstance(p, nnx.Variable))
  axes = ("activation_batch", "activation_length", None)
  like = lambda s, dtype: jax.ShapeDtypeStruct(s, dtype, sharding=layout.sharding(axes[:len(s)], s))
  x, real = like((4, 200, 256), jnp.bfloat16), like((4, 200), bool)

  def loss(state, x, real):
    return nnx.merge(graph, state)(x, real)[0].astype(jnp.float32).sum()

  with sharding.use(layout):
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x, real).compile()
  print(*(compiled.as_text().count(word) for word in ("tpu_custom_call", " ragged-all-to-all")))
"""


@pytest.mark.parametrize("topology", FOUR)
@pytest.mark.parametrize("axis", ["fsdp", "expert"])
def test_it_compiles_for_a_tpu_with_its_gradient_over_four_chips(axis, topology):
  """Nine products: three forward, by inputs and by weights; the last output is not needed. Tokens
  go to experts of other chips, and gradients back: at least those of inputs and of outputs.
  """
  products, sent = map(int, printed(COMPILE, axis, topology)[-1].split())
  assert products >= 8 and (sent >= 4 if axis == "expert" else sent == 0)
