"""Every mesh gives the same losses, and accumulating is one batch: the whole program, by its
configuration.
"""

import functools

import jax
import numpy as np
import pytest

from maxtext import config, program

ROWS, LENGTH, STEPS = 16, 16, 5
COMMON = (
  "run_name=equivalence dtype=float32 vocab_size=320 base_emb_dim=32 base_num_query_heads=4 "
  "base_num_kv_heads=2 base_mlp_dim=64 base_num_decoder_layers=2 steps=10 learning_rate=0.01 "
  f"max_target_length={LENGTH} z_loss_multiplier=1e-3"
).split()
GATED, UNGATED = (
  ("decoder_block=llama2",),
  ("decoder_block=gpt3", "base_num_kv_heads=4", "trainable_position_size=16"),
)
LINEAR = (  # what a document's first token reads is divided by its size, be that next to nothing:
  # at ten times this rate the noise of a step grows tenfold in the next
  *("decoder_block=qwen3_next", "layer_pattern=[linear_dense, dense]", "gdn_num_key_heads=2"),
  *("gdn_num_value_heads=4", "gdn_key_head_dim=8", "gdn_value_head_dim=8", "learning_rate=0.001"),
  "mtp_num_layers=1",
)
SPLIT = ("logical_axis_rules={activation_embed: [tensor]}",)
MESHES = {  # data, fsdp, fsdp_transpose, tensor
  "1": (1, 1, 1, 1),
  "8x1": (8, 1, 1, 1),
  "1x8": (1, 8, 1, 1),
  "2x4": (2, 4, 1, 1),
  "2x2x2": (2, 2, 1, 2),
  "1x4x2": (1, 4, 1, 2),
  "1x2x2x2": (1, 2, 2, 2),
}


def batch(step, rows=ROWS, length=LENGTH):
  random = np.random.default_rng(step)
  ids = random.integers(1, 320, (rows, length + 1)).astype(np.int32)
  cut, at = random.integers(1, length, (rows, 1)), np.arange(length)
  segments = np.where(at < cut, 1, 2).astype(np.int32)  # two documents in each row
  segments[::3, -3:] = 0  # and padding in some
  positions = np.where(at < cut, at, at - cut).astype(np.int32)
  columns = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
  for name in columns.copy():
    columns |= {f"{name}_position": positions, f"{name}_segmentation": segments}
  return columns


def build(mesh, parts, keys):
  """The program on that mesh, with a batch in so many parts."""
  sizes = MESHES[mesh]
  devices = int(np.prod(sizes))
  axes = zip(("data", "fsdp", "fsdp_transpose", "tensor"), sizes)
  keys = [k for k in COMMON if k.split("=")[0] not in {o.split("=")[0] for o in keys}] + list(keys)
  keys += [
    f"per_device_batch_size={ROWS / devices / parts:g}",
    f"gradient_accumulation_steps={parts}",
    *(f"ici_{a}_parallelism={n}" for a, n in axes),
  ]
  return program.build(config.load(keys, {}), jax.devices()[:devices])


@functools.cache
def run(mesh, parts, keys):
  """Losses and gradient norms of five steps, and the parameters after them."""
  built = build(mesh, parts, keys)
  state, numbers = built.init(), []
  places = jax.tree.map(lambda s: s.sharding, built.batch(ROWS))
  for step in range(STEPS):
    state, metrics = built.step(state, jax.device_put(batch(step), places))
    assert metrics["ok"]
    numbers.append(
      [
        float(metrics[name])
        for name in ("loss", "lm_loss", "z_loss", "raw_grad_norm", "total_weights")
      ]
    )
  return np.array(numbers), jax.tree.map(np.asarray, state.params)


def agree(mesh, parts=1, keys=GATED, reference=GATED):
  (numbers, params), (want, want_params) = run(mesh, parts, keys), run("1", 1, reference)
  np.testing.assert_allclose(numbers, want, rtol=1e-5)
  # adamw turns the noise of a gradient near zero into a share of a step of at most learning_rate =
  # 0.01; of a key's bias the whole gradient is such noise (test_a_key_bias_has_no_gradient)
  for name, want in want_params.items():
    if reference is not UNGATED or not name.endswith("attention.key.bias"):
      np.testing.assert_allclose(params[name], want, atol=1e-3, err_msg=name)


def slow_but(*fast, of):
  return [x if x in fast else pytest.param(x, marks=pytest.mark.slow) for x in of]


@pytest.mark.parametrize(
  "mesh", slow_but("8x1", "1x8", "2x4", "2x2x2", of=[m for m in MESHES if m != "1"])
)
def test_every_mesh_gives_the_losses_of_one_device(mesh):
  agree(mesh)


@pytest.mark.parametrize("mesh", slow_but("1", "2x2x2", of=list(MESHES)))
def test_accumulating_is_one_batch(mesh):
  agree(mesh, parts=2)


@pytest.mark.parametrize("mesh", slow_but("2x2x2", of=["2x2x2", "1x4x2", "1x2x2x2"]))
@pytest.mark.parametrize("parts", slow_but(1, of=[1, 2]))
def test_splitting_the_width_of_activations_gives_the_same_losses(mesh, parts):
  agree(mesh, parts, (*GATED, *SPLIT))


@pytest.mark.parametrize("mesh", slow_but("2x2x2", of=[m for m in MESHES if m != "1"]))
def test_a_family_with_biases_and_learned_positions_does_too(mesh):
  agree(mesh, keys=UNGATED, reference=UNGATED)


@pytest.mark.parametrize("mesh", slow_but("2x2x2", of=[m for m in MESHES if m != "1"]))
def test_a_family_with_delta_nets_and_multi_token_prediction_does_too(mesh):
  agree(mesh, keys=LINEAR, reference=LINEAR)


@pytest.mark.parametrize("mesh", ["1", "2x2x2"])
def test_a_key_bias_has_no_gradient(mesh):
  """Without rotation it adds the same to all scores of a query, which a softmax does not see."""
  built = build(mesh, 1, UNGATED)
  columns = jax.device_put(batch(0), jax.tree.map(lambda s: s.sharding, built.batch(ROWS)))
  loss = lambda params: built.evaluate(params, columns)["loss"].total
  grads = jax.jit(jax.grad(loss))(built.init().params)
  size = {
    name: float(abs(grads[f"stages.0.blocks.0.attention.{name}.bias"]).max())
    for name in ("key", "query", "value")
  }
  assert size["key"] < 1e-5 * min(size["query"], size["value"])


@pytest.mark.parametrize(
  "keys",
  [
    ("scan_layers=false",),
    ("remat_policy=minimal",),
    ("num_vocab_tiling=4",),
    pytest.param(("attention=blockwise",), marks=pytest.mark.slow),
  ],
  ids=lambda keys: keys[0],
)
def test_how_it_is_computed_changes_no_loss(keys):
  agree("1", keys=(*GATED, *keys))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [m for m in MESHES if m != "1"])
@pytest.mark.parametrize(
  "keys", [("attention=blockwise",), ("num_vocab_tiling=4",), ("scan_layers=false",)]
)
def test_nor_does_it_on_a_mesh(mesh, keys):
  agree(mesh, keys=(*GATED, *keys))


def test_a_parameter_is_drawn_the_same_on_every_mesh():
  draw = lambda mesh: jax.tree.map(np.asarray, start(mesh))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), draw("2x2x2"), draw("1"))


def start(mesh):
  sizes = MESHES[mesh]
  axes = zip(("data", "fsdp", "fsdp_transpose", "tensor"), sizes)
  keys = [
    *COMMON,
    *GATED,
    "per_device_batch_size=2",
    *(f"ici_{a}_parallelism={n}" for a, n in axes),
  ]
  return program.build(config.load(keys, {}), jax.devices()[: int(np.prod(sizes))]).init().params


def test_a_parameter_stands_split_as_the_rules_say():
  params = start("2x2x2")
  spec = lambda name: tuple(params[f"stages.0.blocks.0.{name}.kernel"].sharding.spec)
  assert spec("attention.query") == (None, "fsdp", "tensor", None)
  assert spec("mlp.down") == (None, "tensor", "fsdp")
  assert tuple(params["embedding"].sharding.spec) == ("tensor", "fsdp")
