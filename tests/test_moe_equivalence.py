"""Mixtures of experts give the same losses on every mesh, whichever path computes them.

By plain descent: adamw makes steps of the noise of gradients near zero, after which a token that
ranks two experts nearly alike may choose the other.
"""

import jax
import numpy as np
import pytest

from tests import test_equivalence as whole

MOE = (
  "decoder_block=mixtral",
  "num_experts=5",
  "opt_type=sgd",
  "learning_rate=0.1",
)
BALANCED = (*MOE, "load_balance_loss_weight=0.1")
PATHS = {
  "dense": ("sparse_matmul=false",),
  "limited": ("sparse_matmul=false", "capacity_factor=0.9"),
  "unscanned": ("scan_layers=false",),
  "kept": ("remat_policy=none",),
}


def agree(mesh, parts=1, keys=BALANCED, reference=BALANCED):
  (numbers, params), (want, expected) = (
    whole.run(mesh, parts, keys),
    whole.run("1", 1, reference),
  )
  np.testing.assert_allclose(numbers, want, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected)


@pytest.mark.parametrize("mesh", whole.slow_but("2x2x2", of=[m for m in whole.MESHES if m != "1"]))
def test_every_mesh_gives_the_losses_of_one_device(mesh):
  agree(mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", whole.MESHES)
def test_accumulating_is_one_batch(mesh):
  """But for the balance loss, which is one of the tokens that are routed together."""
  agree(mesh, 2, MOE, MOE)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", whole.MESHES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_the_same_losses_on_every_mesh(mesh, path):
  reference = BALANCED if path != "limited" else (*BALANCED, *PATHS[path])
  agree(mesh, 1, (*BALANCED, *PATHS[path]), reference)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x2x2", "1x4x2", "1x2x2x2"])
def test_splitting_the_width_of_activations_gives_the_same_losses(mesh):
  agree(mesh, 1, (*BALANCED, *whole.SPLIT))
