"""Every kind of contraction of the model, forward and gradient, on every kind of mesh, for few and
many tokens.

The partitioner's strategy changes with the number of tokens and goes wrong for few of them
(test_partitioner).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from maxtext import sharding
from maxtext.layers.params import Compute, dot, lookup
from maxtext.objectives.cross_entropy import Head, cross_entropy

AXES = ("data", "fsdp", "fsdp_transpose", "tensor")
MESHES = [
  (8, 1, 1, 1),
  (1, 8, 1, 1),
  (2, 4, 1, 1),
  (2, 2, 1, 2),
  (1, 4, 1, 2),
  (1, 1, 2, 4),
  (1, 2, 2, 2),
]
LAYOUTS = [
  (shape, split) for shape in MESHES for split in (False, True) if not split or shape[-1] > 1
]
WIDTH, HEADS, GROUPS, HEAD_DIM, HIDDEN, VOCAB = 64, 8, 4, 16, 128, 256
KINDS = {  # name -> equation, the parameter's axes and sizes, the axes of input and output
  "query": (
    "btd,dhk->bthk",
    {"embed": WIDTH, "q_heads": HEADS, "kv": HEAD_DIM},
    "embed",
    "heads kv",
  ),
  "key": (
    "btd,dgk->btgk",
    {"embed": WIDTH, "kv_heads": GROUPS, "kv_head_dim": HEAD_DIM},
    "embed",
    "kv_heads kv",
  ),
  "out": ("bthk,hkd->btd", {"heads": HEADS, "kv": HEAD_DIM, "embed": WIDTH}, "heads kv", "embed"),
  "up": ("btd,df->btf", {"embed": WIDTH, "mlp": HIDDEN}, "embed", "mlp"),
  "down": ("btf,fd->btd", {"mlp": HIDDEN, "embed": WIDTH}, "mlp", "embed"),
  "head": ("btd,dv->btv", {"embed": WIDTH, "vocab": VOCAB}, "embed", "vocab"),
  "tied head": ("btd,vd->btv", {"vocab": VOCAB, "embed": WIDTH}, "embed", "vocab"),
}
SIZES = {
  "embed": WIDTH,
  "heads": HEADS,
  "kv_heads": GROUPS,
  "kv": HEAD_DIM,
  "mlp": HIDDEN,
  "vocab": VOCAB,
}
COMPUTE = Compute()


def make_layout(shape, split_width):
  mesh = Mesh(
    np.array(jax.devices()[:8]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )
  table = {"activation_batch": ("data", "fsdp", "fsdp_transpose"), "activation_length": ()}
  table |= {f"activation_{name}": ("tensor",) for name in ("heads", "kv_heads", "mlp", "vocab")}
  table |= {
    "activation_kv": (),
    "activation_embed": ("tensor",) if split_width else (),
    "embed": ("fsdp",),
  }
  table |= dict.fromkeys(("heads", "q_heads", "kv_heads"), ("tensor",))
  table |= dict.fromkeys(("mlp", "vocab"), ("fsdp_transpose", "tensor")) | {
    "kv": (),
    "kv_head_dim": (),
  }
  return sharding.Layout(mesh, sharding.Rules(table))


def activation(names):
  return (
    "activation_batch",
    "activation_length",
    *(f"activation_{name}" for name in names.split()),
  )


def inputs(rows, tokens):
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  params = {kind: draw(*axes.values()) for kind, (_, axes, _, _) in KINDS.items()}
  xs = {
    kind: draw(rows, tokens, *(SIZES[n] for n in x.split())) for kind, (_, _, x, _) in KINDS.items()
  }
  ids = random.integers(0, VOCAB, (rows, tokens)).astype(np.int32)
  return params, xs, ids


def everything(params, xs, ids):
  """A number that depends on every contraction, and all their outputs."""
  total, outs = 0.0, {}
  for kind, (equation, axes, x_names, y_names) in KINDS.items():
    p = nnx.Param(params[kind], axes=tuple(axes))
    x = sharding.constrain(xs[kind], *activation(x_names))
    y = sharding.constrain(dot(equation, x, p, COMPUTE), *activation(y_names))
    outs[kind], total = (
      y,
      total + jnp.sin(y).sum(),
    )  # sin: a cotangent that differs from place to place
  rows = lookup(nnx.Param(params["tied head"], axes=("vocab", "embed")), ids, jnp.float32)
  rows = sharding.constrain(rows, *activation("embed"))
  head = Head("btd,dv->btv", ("embed", "vocab"), z_loss=1e-2, tiles=min(2, ids.shape[1]))
  loss, *_ = cross_entropy(head, xs["head"], params["head"], ids, jnp.ones(ids.shape))
  return total + jnp.sin(rows).sum() + loss, outs | {"rows": rows, "loss": loss}


def evaluate(layout, params, xs, ids):
  def run(params, xs, ids):
    with sharding.use(layout):
      return jax.value_and_grad(everything, argnums=(0, 1), has_aux=True)(params, xs, ids)

  if layout is None:
    return jax.tree.map(np.asarray, jax.jit(run)(params, xs, ids))
  place = lambda axes, x: jax.device_put(x, layout.sharding(axes, x.shape))
  params = {kind: place(tuple(KINDS[kind][1]), p) for kind, p in params.items()}
  xs = {kind: place(activation(KINDS[kind][2]), x) for kind, x in xs.items()}
  ids = place(activation(""), ids)
  return jax.tree.map(np.asarray, jax.jit(run)(params, xs, ids))


@pytest.mark.parametrize("tokens", [1, 8, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("shape", "split_width"), LAYOUTS)
def test_every_contraction_is_the_same_on_every_mesh(shape, split_width, tokens):
  layout = make_layout(shape, split_width)
  arrays = inputs(8, tokens)
  # float32 sums of at most 256 x 64 products of unit normals, in another order
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-3),
    evaluate(layout, *arrays),
    evaluate(None, *arrays),
  )


def test_a_gathered_weight_is_not_kept_for_the_backward_pass():
  """The residuals of `dot` are its two inputs; the copy that was gathered is made again."""
  w, x = jnp.ones((WIDTH, HIDDEN)), jnp.ones((2, 4, WIDTH), jnp.bfloat16)
  p = nnx.Param(w, axes=("embed", "mlp"))
  _, pull = jax.vjp(lambda x, w: dot("btd,df->btf", x, p.replace(w), COMPUTE), x, w)
  kept = sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pull))
  assert kept == [((2, 4, WIDTH), "bfloat16"), ((WIDTH, HIDDEN), "float32")]


def test_a_gradient_is_summed_in_float32():
  """1 + 2^-9 added up 512 times is lost in bfloat16, whose sums stop growing at 256."""
  p = nnx.Param(jnp.zeros((1, 1)), axes=("embed", "mlp"))
  x = jnp.ones((1, 512, 1), jnp.bfloat16)
  grad = jax.grad(lambda w: dot("btd,df->btf", x, p.replace(w), COMPUTE).astype(jnp.float32).sum())(
    p[...]
  )
  assert float(grad[0, 0]) == 512
  rows = jnp.zeros((1, 512), jnp.int32)
  grad = jax.grad(lambda w: lookup(p.replace(w), rows, jnp.bfloat16).astype(jnp.float32).sum())(
    p[...]
  )
  assert float(grad[0, 0]) == 512


def test_the_head_takes_tiles_caps_and_weights_as_plain_code_does():
  random = np.random.default_rng(1)
  x = random.normal(size=(2, 8, 16)).astype(np.float32)
  w = random.normal(size=(16, 32)).astype(np.float32)
  targets = random.integers(0, 32, (2, 8)).astype(np.int32)
  weights = (random.random((2, 8)) < 0.7).astype(np.float32)
  head = Head("btd,dv->btv", ("embed", "vocab"), soft_cap=3.0, z_loss=0.1)

  def plain(x, w):
    logits = 3.0 * jnp.tanh(x @ w / 3.0)
    norm = jax.nn.logsumexp(logits, -1)
    entropy = norm - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return ((entropy + 0.1 * norm**2) * weights).sum()

  want = jax.value_and_grad(plain, (0, 1))(x, w)

  def loss(x, w, tiles):
    return cross_entropy(dataclasses.replace(head, tiles=tiles), x, w, targets, weights)[0]

  for tiles in (1, 2, 8):
    got = jax.value_and_grad(loss, (0, 1))(x, w, tiles)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    np.testing.assert_allclose(loss(x, w, tiles), want[0], rtol=1e-6)
