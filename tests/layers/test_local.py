"""Programs of one device: what they make of parts is what is made of the whole, and no two
parameters' gradients are there whole at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from maxtext import collectives, sharding
from maxtext.layers.local import Work, run

NAMES = ("exp", "embed_no_exp", "mlp")


def layout(tensor=1):
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(8 // tensor, tensor), ("fsdp", "tensor"))
  table = {"activation_batch": ("fsdp",), "activation_length": (), "activation_mlp": ("tensor",)}
  return sharding.Layout(
    mesh, sharding.Rules({**table, "exp": (), "embed_no_exp": ("fsdp",), "mlp": ("tensor",)})
  )


def both(tokens, weights):
  """Two products of the same rows, as gate and up are, and a third parameter beside."""
  (x,), (first, second, shift) = tokens, weights
  product = lambda whole, x: jnp.einsum("btd,edf->btf", x, whole.astype(x.dtype))
  (a,) = first.product(product, x)
  b, a = second.product(product, x, beside=[a])
  return a, b + shift.whole.sum((0, 1))


WIDE = ("activation_mlp",)
WORK = Work(both, ((None,),), (WIDE, WIDE))


def drawn():
  numbers = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(numbers.normal(size=shape), jnp.float32)
  return draw(8, 4, 16), [draw(2, 16, 8), draw(2, 16, 8), draw(2, 16, 8)]


def loss(x, params):
  a, b = run(WORK, [x], [nnx.Param(p, axes=NAMES) for p in params])
  return (jnp.sin(a) * b).sum()


def parents(jaxpr):
  """By each variable, those that it is made of."""
  return {out: eqn.invars for eqn in jaxpr.eqns for out in eqn.outvars}


def made_of(jaxpr, variable):
  """All variables that this one is made of."""
  of, seen, left = parents(jaxpr), set(), [variable]
  while left:
    for one in of.get(left.pop(), ()):
      if not isinstance(one, jax.extend.core.Literal) and one not in seen:
        seen.add(one)
        left.append(one)
  return seen


def backward(jaxpr):
  """The last program of one device that is in it."""
  (*_, last) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map"]
  return last.params["jaxpr"]


@pytest.mark.parametrize("tensor", [1, 2])
def test_gradients_are_those_of_the_whole(tensor):
  x, params = drawn()
  found = jax.jit(sharding.within(layout(tensor), jax.grad(loss, (0, 1))))(x, params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    found,
    jax.grad(loss, (0, 1))(x, params),
  )


@pytest.mark.parametrize("tensor", [1, 2])
def test_on_tpus_a_gradient_is_added_up_before_the_next_is_made(tensor, monkeypatch):
  """Unless hidden activations are split, or else they are in any order."""
  monkeypatch.setattr(collectives, "TPU", ("cpu",))
  monkeypatch.setattr(collectives, "torus", lambda mesh: (8, 8, 1))
  x, params = drawn()
  with sharding.use(layout(tensor)):
    program = backward(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, params).jaxpr)
  sums = [eqn for eqn in program.eqns if eqn.primitive.name == "reduce_scatter"]
  sums = [eqn for eqn in sums if eqn.invars[0].aval.shape == (2, 16, 8 // tensor)]
  assert len(sums) == 3  # also that of the third, which waits for none
  waits = [
    sum(other.outvars[0] in made_of(program, one.invars[0]) for other in sums) for one in sums
  ]
  assert sorted(waits) == ([0, 0, 1] if tensor == 1 else [0, 0, 0])
