"""What the compiled step sends between devices, read from the text that XLA compiled: the gradient
of a weight is added up by one reduce-scatter, never whole on every device.
"""

import functools
import math
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from maxtext import collectives as sent
from maxtext import config, program, sharding
from maxtext.layers.params import Compute, contract
from maxtext.objectives import cross_entropy
from tests.chips import printed

ROOT = Path(__file__).parents[1]

ROWS, LENGTH = 4, 4  # few tokens: an activation is smaller than the smallest weight
KEYS = (
  "run_name=collectives dtype=float32 vocab_size=320 base_emb_dim=32 base_num_query_heads=4 "
  "base_num_kv_heads=2 base_mlp_dim=64 base_num_decoder_layers=2 steps=10 "
  f"per_device_batch_size=0.5 max_target_length={LENGTH}"
).split()
FSDP, TENSOR = 4, 2  # both split every weight, fsdp alone the batch
MESH = (f"ici_fsdp_parallelism={FSDP}", f"ici_tensor_parallelism={TENSOR}")


@functools.cache
def compiled(*keys, mesh=MESH, rows=ROWS):
  own = {key.split("=")[0] for key in keys}
  common = [key for key in KEYS if key.split("=")[0] not in own]
  built = program.build(config.load([*common, *mesh, *keys], {}), jax.devices()[:8])
  return built, built.step.lower(built.state, built.batch(rows)).compile().as_text()


def collectives(text, kind):
  """The elements of every array that a collective of this kind makes on a device, and the name of
  the operation it comes from.
  """
  found = []
  for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
    if made := re.search(rf" = (.*?) {kind}(-start)?\(", line):
      name = re.search(r'op_name="([^"]*)"', line)
      for dims in re.findall(r"[a-z]\w*\[([\d,]*)\]", made[1]):
        size = math.prod(int(d) for d in dims.split(",") if d)
        found.append((size, name[1] if name else ""))
  return found


def contracted(built):
  """Elements of every parameter that is contracted, of a single layer, by name."""
  return {
    name: math.prod(p.shape) // (p.shape[0] if p.stacked else 1)
    for name, p in built.plan.declared.items()
    if name != "embedding" and len(set(p.axes) - {"layers", "layers_outside_pipeline"}) > 1
  }


@pytest.mark.parametrize("policy", ["none", "minimal_with_context", "full"])
def test_every_gradient_of_a_weight_is_added_up_by_one_reduce_scatter(policy):
  built, text = compiled(f"remat_policy={policy}")
  weights = contracted(built)
  assert len(weights) == 8, weights  # four of attention, three of the mlp, and the unembedding
  parts = sorted(size // (FSDP * TENSOR) for size in weights.values())
  assert sorted(size for size, _ in collectives(text, "reduce-scatter")) == parts


@pytest.mark.parametrize("tiles", [1, 2])
def test_no_gradient_of_a_weight_is_added_up_whole(tiles):
  built, text = compiled("remat_policy=full", f"num_vocab_tiling={tiles}")
  whole = min(contracted(built).values()) // TENSOR  # what a device adds up before it is split
  assert 0 < max(size for size, _ in collectives(text, "all-reduce")) < whole


def test_in_tiles_the_gradient_of_the_unembedding_is_sent_piece_by_piece():
  """No device holds its share of the whole of it."""
  built, text = compiled("remat_policy=full", "num_vocab_tiling=2")
  whole, pieces = contracted(built)["unembedding"], cross_entropy.PIECES  # few tokens: the most
  found = [size for size, name in collectives(text, "reduce-scatter") if "while/body" in name]
  assert whole // (FSDP * TENSOR) // pieces in found
  assert f"f32[1,32,{320 // TENSOR}]" not in text


def test_a_table_is_not_gathered_for_a_lookup():
  """Twice the unembedding is what a table gathered as well would be."""
  built, text = compiled("remat_policy=full")
  whole = contracted(built)["unembedding"] // TENSOR
  gathered = [size for size, _ in collectives(text, "all-gather")]
  assert sum(size >= whole for size in gathered) == 1


def test_an_optimizer_split_over_copies_keeps_a_share_and_sends_each_parameter_once():
  copies = ("ici_fsdp_parallelism=1", "ici_data_parallelism=8")
  built, text = compiled("shard_optimizer_over_data=true", mesh=copies, rows=8)
  here = lambda tree: sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree) if leaf.ndim
  )
  params = here(built.state.params)
  assert here(built.state.opt_state) == 2 * params / 8  # two means of each
  assert sum(size for size, _ in collectives(text, "all-gather")) == params


@pytest.mark.parametrize(
  ("keys", "block"),
  [((), 1 * 4 * 2 * 32), (("sparse_matmul=false", "capacity_factor=1.0"), 1 * 2 * 1 * 32)],
  ids=["dropless", "limited"],
)
def test_weights_of_experts_stay_where_they_are_and_tokens_go_to_them(keys, block):
  """Along the axis of experts there travel, for every device, a block of rows: there and back, and
  on the way back rows and their gradients there, and gradients back. Each weight of experts is
  joined twice over fsdp, and its gradient added up once.
  """
  moe = ("decoder_block=mixtral", "num_experts=8", "base_mlp_dim=24", "opt_type=sgd", *keys)
  built, text = compiled(*moe, mesh=("ici_fsdp_parallelism=2", "ici_expert_parallelism=4"), rows=8)
  found = lambda kind, size: sum(s == size for s, _ in collectives(text, kind))
  assert found("all-to-all", block) == 5 * 4
  kernel = 2 * 32 * 24  # of a device's two experts
  assert found("all-gather", kernel) == 3 * 2 and found("reduce-scatter", kernel // 2) == 3
  assert max(size for size, _ in collectives(text, "all-reduce")) <= 32  # scales of norms


@pytest.mark.parametrize(
  "dimension, shape",
  [
    (0, (8, 16, 24)),
    (1, (8, 16, 24)),
    (2, (8, 16, 24)),
    (0, (64, 24)),
    (0, (24, 16)),
    (1, (4, 24)),
  ],
)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_over_all_devices_two_steps_do_what_one_does(sizes, dimension, shape, monkeypatch):
  """Also for matrices whose rows fill no whole tiles."""
  names = tuple(sizes)
  layout = sharding.Layout(
    Mesh(np.array(jax.devices()[:8]).reshape(*sizes.values()), names), sharding.Rules({})
  )
  monkeypatch.setattr(sent, "TPU", ("cpu",))
  monkeypatch.setattr(sent, "torus", lambda mesh: (8, 2, 3))
  monkeypatch.setattr(sent, "WIDE", 16)
  x = jax.random.normal(jax.random.key(0), (8, *shape))
  split = P(*[None] * dimension, names)
  run = lambda function, *specs: jax.jit(
    sharding.within(layout, lambda x: sharding.by_device(function, *specs)(x))
  )
  lowered = run(lambda part: sent.add_and_split(part[0], names, dimension), P(names), split)
  lowered = lowered.lower(x)
  assert lowered.as_text().count("reduce_scatter") == 2
  np.testing.assert_allclose(lowered.compile()(x), x.sum(0), atol=1e-5)
  whole = run(lambda part: sent.join(part, names, dimension)[None], split, P(names)).lower(x[0])
  assert whole.as_text().count('"stablehlo.all_gather"') == 2
  np.testing.assert_array_equal(whole.compile()(x[0]), np.stack([x[0]] * 8))


@pytest.mark.parametrize("tensor", [1, 2])
def test_on_tpus_a_gradient_is_added_up_before_the_next_is_made(tensor, monkeypatch):
  """Unless hidden activations are split; and it changes no number."""
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(8 // tensor, tensor), ("fsdp", "tensor"))
  table = {"activation_batch": ("fsdp",), "embed": ("fsdp",), "mlp": ("tensor",)}
  rules = sharding.Rules({**table, "activation_length": (), "activation_mlp": ("tensor",)})
  layout = sharding.Layout(mesh, rules)
  monkeypatch.setattr(sent, "TPU", ("cpu",))
  monkeypatch.setattr(sent, "torus", lambda mesh: (8, 8, 1))
  x = jax.random.normal(jax.random.key(0), (8, 4, 16))
  w = jax.random.normal(jax.random.key(1), (16, 24))

  def product(x, w):
    return jnp.sin(contract("btd,df->btf", x, w, ("embed", "mlp"), Compute())).sum()

  grads = jax.grad(product, (0, 1))
  lowered = jax.jit(sharding.within(layout, grads)).lower(x, w)
  assert ("optimization_barrier" in lowered.as_text()) == (tensor == 1)
  for found, wanted in zip(lowered.compile()(x, w), grads(x, w)):
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_torus_is_seen_as_the_mesh_counts_its_chips():
  chip = lambda index, slice, *coords: types.SimpleNamespace(slice_index=slice, coords=coords)
  count = lambda *sizes: [chip(0, s, *at) for s in (0, 1) for at in np.ndindex(*sizes)]
  mesh = lambda chips: types.SimpleNamespace(devices=np.array(chips))
  torus = sent.torus.__wrapped__
  assert torus(mesh(count(4, 4, 8))) == (128, 8, 3)
  assert torus(mesh(count(16, 16, 1))) == (256, 16, 2)
  assert torus(mesh(count(1, 1, 4))) == (4, 4, 1)


FOR_A_TPU = """
  import jax, re, sys
  from jax.experimental import mesh_utils, topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
  from maxtext import collectives, sharding

  name, dimension, shape = sys.argv[1], int(sys.argv[2]), tuple(map(int, sys.argv[3:]))
  devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  mesh = Mesh(mesh_utils.create_device_mesh((len(devices),), devices), ("fsdp",))
  layout, split = sharding.Layout(mesh, sharding.Rules({})), P(*[None] * dimension, "fsdp")
  for function, inputs, outputs in (
    (lambda part: collectives.add_and_split(part, ("fsdp",), dimension), P(), split),
    (lambda part: collectives.join(part, ("fsdp",), dimension), split, P()),
  ):
    run = sharding.within(layout, lambda x: sharding.by_device(function, inputs, outputs)(x))
    x = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, inputs))
    text = jax.jit(run).lower(x).compile().as_text()
    print(*re.findall(r" (all-reduce|reduce-scatter|all-gather)(?:-start)?\\(", text))
"""


@pytest.mark.parametrize(
  ("slice", "dimension", "shape"),
  [
    ("v5e:4x4", 0, (512, 256)),
    ("v5p:4x4x4", 0, (4096, 1024)),
    ("v5p:4x4x4", 0, (64 * 45, 2**16)),  # no whole tiles
    ("v5p:4x4x4", 0, (4096, 8, 128)),
    ("v5p:4x4x4", 1, (4, 4096, 512)),
    ("v5p:4x4x4", 2, (16, 128, 4096)),
  ],
  ids=str,
)
def test_over_all_chips_the_tpu_compiler_makes_no_whole_sum(slice, dimension, shape):
  lines = printed(FOR_A_TPU, *map(str, (slice, dimension, *shape)))
  gathers = 2 if slice.startswith("v5p") else 1
  assert lines == ["reduce-scatter reduce-scatter", " ".join(["all-gather"] * gathers)]
