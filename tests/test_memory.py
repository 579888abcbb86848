"""The bytes of a step on a device are those of XLA's own buffer assignment: arguments, whose place
the outputs take, and temporaries, on eight devices of a CPU. Sizes are such that arrays count, and
not constants.
"""

import dataclasses

import jax
import pytest

from maxtext import config, estimate, program
from maxtext.estimate.layouts import model_of

COMMON = {
  "run_name": "memory",
  "steps": 10,
  "vocab_size": 1536,
  "base_emb_dim": 160,
  "base_num_query_heads": 6,
  "base_num_kv_heads": 2,
  "head_dim": 48,
  "base_mlp_dim": 576,
  "base_num_decoder_layers": 5,
  "max_target_length": 288,
  "per_device_batch_size": 2,
  "ici_fsdp_parallelism": 8,
}
F32, FULL, NONE = "dtype=float32", "remat_policy=full", "remat_policy=none"
TENSOR = "ici_fsdp_parallelism=4 ici_tensor_parallelism=2"
WIDE = (  # many parameters, few tokens
  "base_emb_dim=640 base_mlp_dim=1792 vocab_size=3072 max_target_length=48 per_device_batch_size=1"
)
MOE = "decoder_block=mixtral num_experts=6 base_moe_mlp_dim=288 base_mlp_dim="
MLA = (
  "decoder_block=deepseek3 num_experts=4 base_moe_mlp_dim=256 shared_experts=1 q_lora_rank=64 "
  "kv_lora_rank=96 qk_nope_head_dim=40 qk_rope_head_dim=24 v_head_dim=48 base_num_kv_heads= "
  "head_dim= base_mlp_dim="
)
STAGES = "ici_fsdp_parallelism=2 ici_pipeline_parallelism=4 base_num_decoder_layers=8"
CASES = {
  "dense": F32,
  "dense, all kept": f"{F32} {NONE}",
  "dense, nothing kept": f"{F32} {FULL}",
  "bf16": "base_num_kv_heads=6",
  "bf16, nothing kept": FULL,
  "bf16, minimal": f"remat_policy=minimal {TENSOR}",
  "bf16 weights": f"weight_dtype=bfloat16 {TENSOR} remat_policy=save_qkv_proj",
  "all scores": f"attention=dot_product {F32}",
  "short": f"{F32} max_target_length=72",
  "long": "max_target_length=960 per_device_batch_size=1 base_num_decoder_layers=3",
  "context": "ici_fsdp_parallelism=2 ici_context_parallelism=4",
  "ring, accumulated": "ici_fsdp_parallelism=4 ici_context_parallelism=2 "
  "context_parallel_strategy=ring gradient_accumulation_steps=2",
  "copies": f"{WIDE} ici_data_parallelism=8 ici_fsdp_parallelism=1 base_num_decoder_layers=2",
  "copies, optimizer split": f"{WIDE} ici_data_parallelism=8 ici_fsdp_parallelism=1 "
  "base_num_decoder_layers=2 shard_optimizer_over_data=true",
  "wide, accumulated": f"{WIDE} {F32} gradient_accumulation_steps=2",
  "vocabulary": "vocab_size=24576 base_num_decoder_layers=2",
  "vocabulary in tiles": f"vocab_size=24576 base_num_decoder_layers=2 num_vocab_tiling=4 {TENSOR}",
  "unrolled": f"scan_layers=false base_num_decoder_layers=3 {F32} {TENSOR}",
  "experts": f"{MOE} {F32}",
  "experts, nothing kept": f"{MOE} {FULL} {TENSOR}",
  "latent": MLA,
  "latent, accumulated": f"{MLA} {F32} {FULL} gradient_accumulation_steps=2",
  "learned positions": "decoder_block=gpt3 trainable_position_size=512 base_num_kv_heads=6",
  "windows": "decoder_block=gemma3 sliding_window_size=64 base_num_decoder_layers=12 "
  "logits_via_embedding=true",
  "stages": f"{STAGES} num_pipeline_microbatches=8 {F32}",
  "stages, all once": STAGES,
  "stages, twice": f"{STAGES} num_pipeline_repeats=2 {FULL}",
  "stages, experts": f"{MOE} ici_fsdp_parallelism=2 ici_expert_parallelism=2 "
  "ici_pipeline_parallelism=2 base_num_decoder_layers=4 num_pipeline_microbatches=4",
}
FAST = ("bf16, minimal", "wide, accumulated", "experts, nothing kept")


def built(case):
  own = dict(word.split("=", 1) for word in CASES[case].split())
  keys = [f"{key}={value}" for key, value in (COMMON | own).items() if value != ""]
  return program.build(config.load(keys, {}), jax.devices()[:8])


@pytest.mark.parametrize(
  "case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES]
)
def test_the_bytes_of_a_step_are_those_that_xla_assigns(case):
  """Within a tenth; the state's to the byte, but for counters and the batch."""
  made = built(case)
  training = made.config.training
  rows = made.batch(training.global_batch(8))
  compiled = made.step.lower(made.state, rows).compile()
  ours, theirs = estimate.of_step(made), estimate.compiled_bytes(compiled)
  print(
    f"{case} | {ours.total / 2**20:.1f} | {theirs / 2**20:.1f} | {ours.total / theirs - 1:+.1%}"
  )
  state = compiled.memory_analysis().argument_size_in_bytes
  assert ours.params == estimate.bytes_per_device(made.state.params)
  assert 0 <= state - ours.params - ours.optimizer < 0.02 * state
  assert ours.total == pytest.approx(theirs, rel=0.1)


def test_what_is_kept_grows_with_the_layers_and_the_tokens_and_nothing_else_does():
  made = built("bf16, minimal")
  model, parts = (
    estimate.model_of(made),
    estimate.Parts(made.layout.rules.table, made.layout.mesh.shape),
  )
  one, more = model.bytes(parts, 16, 1), model.bytes(parts, 32, 1)
  assert more.activations == 2 * one.activations
  assert dataclasses.replace(more, activations=0, work=0) == dataclasses.replace(
    one, activations=0, work=0
  )


@pytest.mark.parametrize(("length", "point"), [(16, "update"), (4096, "backward")])
def test_an_optimizer_that_the_hosts_keep_is_there_for_the_update_alone(length, point):
  def held(offload):
    keys = COMMON | {"max_target_length": length, "optimizer_memory_host_offload": offload}
    typed = [f"{key}={value}" for key, value in keys.items()]
    model = model_of(config.load([*typed, "hardware=cpu", "devices=8"], {}))
    rules = {name: tuple(axes) for name, axes in model.config.mesh.logical_axis_rules.items()}
    return model.bytes(estimate.Parts(rules, {}), 16, 1)

  near, far = held("false"), held("true")
  state = near.params + near.optimizer + near.grads
  assert far.total == max(near.total - near.optimizer, state)
  assert far.point == point
