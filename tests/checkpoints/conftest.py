"""Small states on eight virtual devices, and the folders they are saved in."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxtext.checkpoints.manager import Checkpoints
from maxtext.checkpoints.sections import Checkpoint

SECTION = Checkpoint(
  enable_checkpointing=True,
  async_checkpointing=True,
  checkpoint_period=10,
  max_num_checkpoints_to_keep=3,
  checkpoint_keep_period=-1,
  checkpoint_keep_best=0,
  save_checkpoint_on_start=False,
  save_checkpoint_on_completion=True,
  load_parameters_path="",
  load_full_state_path="",
  checkpoint_storage_use_ocdbt=True,
  checkpoint_storage_use_zarr3=True,
  enable_continuous_checkpointing=False,
  enable_single_replica_ckpt_restoring=False,
  enable_emergency_checkpoint=False,
  local_checkpoint_directory="",
  local_checkpoint_period=0,
)
EXTRA = {"data": {"epoch": 2, "offset": 17}, "config": "steps: 60\nrun_name: 'ä'\n"}


class States:
  """Makes states of a tiny model that tell one step from another, on meshes of different shapes."""

  specs = {
    "embedding": P("fsdp", "tensor"),
    "layers.up": P(None, "tensor", "fsdp"),
    "norm.scale": P(),
  }
  shapes = {"embedding": (16, 32), "layers.up": (2, 8, 16), "norm.scale": (5,)}
  dtypes = {"embedding": jnp.float32, "layers.up": jnp.bfloat16, "norm.scale": jnp.float32}

  def mesh(self, fsdp: int, tensor: int) -> Mesh:
    devices = np.array(jax.devices()[: fsdp * tensor]).reshape(fsdp, tensor)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

  def target(self, mesh: Mesh):
    whole = NamedSharding(mesh, P())
    params = {
      name: jax.ShapeDtypeStruct(
        shape, self.dtypes[name], sharding=NamedSharding(mesh, self.specs[name])
      )
      for name, shape in self.shapes.items()
    }
    moments = {
      "mu": params,
      "nu": params,
      "count": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    }
    return {
      "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
      "params": params,
      "opt_state": (moments, {}),
    }

  def of(self, step: int, mesh: Mesh):
    """The state after `step` steps: random numbers, special floats among them."""
    rng = np.random.default_rng(step)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
      if not leaf.shape:
        return jax.device_put(np.int32(step), leaf.sharding)
      values = rng.normal(size=leaf.shape).astype(np.float32)
      values.flat[:3] = np.nan, -0.0, np.inf
      return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, self.target(mesh))


@pytest.fixture(scope="session")
def states() -> States:
  return States()


@pytest.fixture
def open_checkpoints(tmp_path):
  """Checkpoints in a fresh run folder, with some settings changed; closed after the test."""
  opened = []

  def open_(directory=tmp_path / "run" / "checkpoints", **changes) -> Checkpoints:
    opened.append(Checkpoints(directory, dataclasses.replace(SECTION, **changes)))
    return opened[-1]

  yield open_
  for checkpoints in opened:
    checkpoints.close()


@pytest.fixture
def extra() -> dict:
  return dict(EXTRA)


@pytest.fixture
def same_bits():
  """Whether two trees of arrays have the same structure, shapes, dtypes and bytes."""

  def compare(left, right) -> bool:
    if jax.tree.structure(left) != jax.tree.structure(right):
      return False
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(
      (a.shape, a.dtype) == (b.shape, b.dtype)
      and np.asarray(a).tobytes() == np.asarray(b).tobytes()
      for a, b in pairs
    )

  return compare
