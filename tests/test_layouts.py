"""Every layout of the mesh trains the same model to the same numbers as one device."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from maxtext import config, program
from maxtext.errors import ConfigErrors
from maxtext.kernels.context import balanced_order
from tests.test_equivalence import batch

STEPS, ROWS, LENGTH = 5, 8, 16
COMMON = (
  "run_name=layouts dtype=float32 vocab_size=320 base_emb_dim=32 base_num_query_heads=4 "
  "base_num_kv_heads=2 base_mlp_dim=64 base_num_decoder_layers=2 steps=10 z_loss_multiplier=1e-3 "
  "learning_rate=0.002 adam_eps=1e-5"  # above the noise of a gradient, which adamw divides by it
).split()
MODELS = {
  "gqa": ("decoder_block=llama2",),
  "window": ("decoder_block=llama2", "sliding_window_size=5", "attention_sink=true"),
  "moe": (
    "decoder_block=mixtral",
    "num_experts=5",
    "opt_type=sgd",  # steps of a gradient's noise would let a token choose another expert
    "learning_rate=0.1",
    "load_balance_loss_weight=0.1",
  ),
  "learned": ("decoder_block=gpt3", "base_num_kv_heads=4", "trainable_position_size=128"),
  "linear": (
    *("decoder_block=qwen3_next", "layer_pattern=[linear_dense, dense]", "gdn_num_key_heads=2"),
    *("gdn_num_value_heads=4", "gdn_key_head_dim=8", "gdn_value_head_dim=8", "mtp_num_layers=1"),
    "learning_rate=0.0005",  # see test_equivalence
  ),
}


def ways(**sizes):
  return tuple(f"ici_{axis}_parallelism={n}" for axis, n in ({"fsdp": 1} | sizes).items())


RING, ULYSSES = "context_parallel_strategy=ring", "context_parallel_strategy=ulysses"
PLAIN = "context_parallel_load_balance=false"
ZERO = "shard_optimizer_over_data=true"
LAYOUTS = {
  "context 8": ways(context=8),
  "context 8, unbalanced": (*ways(context=8), PLAIN),
  "context 8, ring": (*ways(context=8), RING),
  "context 8, ring, unbalanced": (*ways(context=8), RING, PLAIN),
  "context 2 tensor 2 fsdp 2, ulysses": (*ways(context=2, tensor=2, fsdp=2), ULYSSES),
  "fsdp 2 context 4": ways(fsdp=2, context=4),
  "fsdp 2 context 4, ring": (*ways(fsdp=2, context=4), RING),
  "data 2 context 2 tensor 2, ring": (*ways(data=2, context=2, tensor=2), RING),
  "data 2 fsdp 2 context 2": ways(data=2, fsdp=2, context=2),
  "sequence 2 context 2 fsdp 2": ways(sequence=2, context=2, fsdp=2),
  "fsdp_transpose 2 context 2 tensor 2": ways(fsdp_transpose=2, context=2, tensor=2),
  "tensor_transpose 8": ways(tensor_transpose=8),
  "fsdp 2 tensor 2 tensor_transpose 2": ways(fsdp=2, tensor=2, tensor_transpose=2),
  "data 2 fsdp 2 tensor_transpose 2": ways(data=2, fsdp=2, tensor_transpose=2),
  "context 2 tensor_transpose 2 fsdp 2": ways(context=2, tensor_transpose=2, fsdp=2),
  "pure_fsdp": ("custom_mesh_and_rule=pure_fsdp", *ways(data=2, fsdp=4)),
  "2d_fsdp": ("custom_mesh_and_rule=2d_fsdp", *ways(fsdp=4, fsdp_transpose=2)),
  "context": ("custom_mesh_and_rule=context", *ways(fsdp=2, context=2, tensor=2)),
  "megatron_sp": ("custom_mesh_and_rule=megatron_sp", *ways(data=2, fsdp=2, tensor=2)),
  "data 4 tensor 2, zero": (*ways(data=4, tensor=2), ZERO),
  "data 2 fsdp 4, zero": (*ways(data=2, fsdp=4), ZERO),
  "fsdp 2 context_autoregressive 2 autoregressive 2": ways(
    fsdp=2, context_autoregressive=2, autoregressive=2
  ),
  "tensor_sequence 2 fsdp 4": ways(tensor_sequence=2, fsdp=4),
  "data 2 fsdp 2 tensor_sequence 2": ways(data=2, fsdp=2, tensor_sequence=2),
}


def run(layout, model, rows=ROWS, length=LENGTH, parts=1):
  return trained(LAYOUTS[layout] if layout else None, MODELS[model], rows, length, parts)


@functools.cache
def trained(mesh, model, rows, length, parts):
  """Losses and gradient norms of five steps, and the parameters after them; on one device if there
  is no mesh.
  """
  devices = jax.devices()[: 8 if mesh else 1]
  own = {key.split("=")[0] for key in model}
  own |= {"adam_eps"} if "opt_type" in own else set()
  keys = [key for key in COMMON if key.split("=")[0] not in own]
  keys += [*model, *(mesh or ways()), f"max_target_length={length}"]
  keys += [f"gradient_accumulation_steps={parts}"]
  keys += [f"per_device_batch_size={rows / len(devices) / parts:g}"]
  built = program.build(config.load(keys, {}), devices)
  state, numbers = built.init(), []
  places = jax.tree.map(lambda s: s.sharding, built.batch(rows))
  names = ("loss", "lm_loss", "z_loss", "raw_grad_norm", "total_weights")
  for step in range(STEPS):
    state, metrics = built.step(state, jax.device_put(batch(step, rows, length), places))
    numbers.append([float(metrics[name]) for name in names])
  return np.array(numbers), jax.tree.map(np.asarray, state.params)


def differences(layout, model, *sizes):
  return apart(run(layout, model, *sizes), run(None, model, *sizes))


def apart(found, expected):
  """The largest relative difference of the losses and norms, and that of the parameters."""
  (numbers, params), (want, truth) = found, expected
  loss = float(np.abs(numbers / np.maximum(want, 1e-9) - 1).max())
  return loss, max(float(np.abs(params[name] - truth[name]).max()) for name in truth)


FAST = {
  "fsdp 2 context 4, ring": "gqa",
  "context 2 tensor 2 fsdp 2, ulysses": "window",
  "context 2 tensor_transpose 2 fsdp 2": "learned",
  "megatron_sp": "gqa",
  "data 4 tensor 2, zero": "gqa",
  "2d_fsdp": "gqa",
  "data 2 fsdp 2 context 2": "moe",
}
CASES = [
  pytest.param(layout, model, marks=() if FAST.get(layout) == model else pytest.mark.slow)
  for layout in LAYOUTS
  for model in MODELS
  if model != "linear" or PLAIN in LAYOUTS[layout] or ULYSSES in LAYOUTS[layout]
  if model != "moe" or ZERO not in LAYOUTS[layout]  # sgd keeps no state
]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_a_layout_changes_no_number(layout, model):
  loss, parameters = differences(layout, model)
  print(f"{layout} | {model} | {loss:.1e} | {parameters:.1e}")
  assert loss < 1e-5
  assert parameters < 1e-4  # 1 % of what five steps move them at most


@pytest.mark.parametrize(
  ("layout", "model", "parts"),
  [
    ("megatron_sp", "gqa", 2),
    ("data 2 fsdp 2 tensor_transpose 2", "linear", 1),
    *(
      pytest.param(layout, model, 1, marks=pytest.mark.slow)
      for layout in LAYOUTS
      for model in MODELS
      if model != "linear" or "context" not in layout
      if (layout, model) != ("data 2 fsdp 2 tensor_transpose 2", "linear")
      if model != "moe" or ZERO not in LAYOUTS[layout]
    ),
  ],
)
def test_nor_does_it_where_types_say_how_arrays_are_split(layout, model, parts):
  mesh = (*LAYOUTS[layout], "shard_mode=explicit")
  found = trained(mesh, MODELS[model], ROWS, LENGTH, parts)
  loss, parameters = apart(found, run(None, model, parts=parts))
  print(f"{layout}, explicit | {model} | {loss:.1e} | {parameters:.1e}")
  assert loss < 1e-5 and parameters < 1e-4


@pytest.mark.parametrize("mode", ["auto", pytest.param("explicit", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  "layout",
  [
    pytest.param(
      name,
      marks=() if name in ("2d_fsdp", "context 2 tensor_transpose 2 fsdp 2") else pytest.mark.slow,
    )
    for name in LAYOUTS
  ],
)
@pytest.mark.parametrize("model", ["gqa", pytest.param("learned", marks=pytest.mark.slow)])
def test_nor_does_it_with_the_loss_in_tiles(layout, model, mode):
  """The unembedding's gradient is sent in pieces then; `learned` ties it to the embedding."""
  mesh = (*LAYOUTS[layout], f"shard_mode={mode}", "num_vocab_tiling=2")
  loss, parameters = apart(trained(mesh, MODELS[model], ROWS, LENGTH, 1), run(None, model))
  print(f"{layout}, {mode}, in tiles | {model} | {loss:.1e} | {parameters:.1e}")
  assert loss < 1e-5 and parameters < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "length", "parts"), [(8, 8, 1), (16, 128, 2), (64, 16, 1)])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "8" not in name])
def test_nor_does_it_with_few_tokens_or_many(layout, rows, length, parts):
  """The compiler's choices change with the number of tokens."""
  loss, parameters = differences(layout, "gqa", rows, length, parts)
  print(f"{layout} | {rows} x {length} in {parts} | {loss:.1e} | {parameters:.1e}")
  assert loss < 1e-5 and parameters < 1e-4


def test_an_order_that_balances_gives_every_device_as_much_to_see():
  order = balanced_order(48, 4)
  assert sorted(order) == list(range(48))
  assert len({int((part + 1).sum()) for part in np.split(order, 4)}) == 1


@pytest.mark.parametrize(
  ("keys", "says"),
  [
    (
      "ici_context_parallelism=8 max_target_length=20",
      "max_target_length: 20 tokens cannot be split over context 8; use a multiple of 8",
    ),
    (
      "ici_context_parallelism=8 max_target_length=24",
      "over context 8 in two chunks each; use a multiple of 16, or context_parallel_load_balance=",
    ),
    (
      "ici_context_parallelism=4 ici_sequence_parallelism=2 max_target_length=32 "
      "num_vocab_tiling=16 context_parallel_strategy=ulysses",
      "over sequence 2 x context 4 in 16 tiles each; use a multiple of 128, or num_vocab_tiling=1",
    ),
    (
      "ici_tensor_transpose_parallelism=8 base_emb_dim=36 base_num_query_heads=1 "
      "base_num_kv_heads=1",
      "36 channels cannot be split over tensor_transpose 8; divisors are 1, 2, 3, 4, 6, 9, 12",
    ),
    (
      "context_parallel_strategy=ulysses context_parallel_load_balance=false "
      "ici_context_parallelism=2",
      "has an effect only with context_parallel_strategy=all_gather or ring",
    ),
  ],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_is_compiled(keys, says):
  words = [*keys.split(), "hardware=cpu", "devices=8"]
  with pytest.raises(ConfigErrors) as refused:
    config.load(words, {})
  assert says in str(refused.value) and len(str(refused.value)) < 300
