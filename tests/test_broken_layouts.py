"""Layouts that cannot be: each is refused before anything is compiled, in a sentence that names the
dimension, the mesh axis and a size that works, and that size does work.
"""

from __future__ import annotations

import functools

import jax
import pytest

from maxtext import config, program
from maxtext.errors import ConfigErrors

COMMON = (
  "run_name=broken vocab_size=320 base_emb_dim=32 base_num_query_heads=4 base_num_kv_heads=2 "
  "base_mlp_dim=64 base_num_decoder_layers=4 max_target_length=64 per_device_batch_size=1 "
  "hardware=cpu devices=8"
)
MOE = "decoder_block=mixtral num_experts=4 base_moe_mlp_dim=24 base_mlp_dim="
MLA = "decoder_block=deepseek3 num_experts=4 base_moe_mlp_dim=24 base_mlp_dim= base_num_kv_heads="
DELTA = (
  "decoder_block=qwen3_next layer_pattern=[linear_dense] gdn_num_key_heads=2 gdn_num_value_heads=4 "
  "gdn_key_head_dim=8 gdn_value_head_dim=8 base_num_query_heads= base_num_kv_heads="
)
ULYSSES = "context_parallel_strategy=ulysses"
TWO = "num_slices=2"


def ways(**sizes):
  keys = {"slices": "num_slices", "stage": "ici_pipeline_parallelism"}
  named = ((keys.get(a, f"ici_{a}_parallelism"), n) for a, n in sizes.items())
  return " ".join(f"{key}={n}" for key, n in named)


# What is typed; what the complaint says; what makes it right, whose value the complaint has named.
BROKEN = [
  # heads
  (ways(tensor=8), "4 query heads cannot be split over tensor 8", ways(tensor=2)),
  (ways(tensor=4), "2 kv heads cannot be split over tensor 4", "base_num_kv_heads=4"),
  (
    f"{ways(tensor=4)} base_num_query_heads=6 base_num_kv_heads=6 base_emb_dim=48",
    "6 query heads cannot be split over tensor 4; divisors are 1, 2, 3, 6",
    ways(tensor=2),
  ),
  (
    ways(tensor_sequence=4),
    "2 kv heads cannot be split over tensor_sequence 4",
    "base_num_kv_heads=4",
  ),
  (
    ways(tensor=2, tensor_sequence=2),
    "2 kv heads cannot be split over tensor 2 x tensor_sequence 2",
    ways(tensor_sequence=1),
  ),
  (f"{MLA} {ways(tensor=8)}", "4 query heads cannot be split over tensor 8", ways(tensor=4)),
  (
    f"{DELTA} {ways(tensor=4)}",
    "2 key heads of delta nets cannot be split over tensor 4",
    "gdn_num_key_heads=4",
  ),
  (
    f"{DELTA} {ways(tensor=8)} gdn_num_key_heads=12 gdn_num_value_heads=12",
    "12 key heads of delta nets cannot be split over tensor 8; divisors are 1, 2, 3, 4, 6, 12",
    ways(tensor=4),
  ),
  # width, mlp, vocabulary
  ("base_emb_dim=36 head_dim=8", "36 channels cannot be split over fsdp 8", "base_emb_dim=40"),
  (
    f"base_emb_dim=36 head_dim=8 {ways(fsdp=2, context=4)}",
    "36 channels cannot be split over fsdp 2 x context 4",
    "base_emb_dim=40",
  ),
  (
    f"base_emb_dim=36 head_dim=8 {ways(tensor_transpose=8)}",
    "36 channels cannot be split over tensor_transpose 8",
    "base_emb_dim=40",
  ),
  (
    f"base_emb_dim=36 head_dim=8 {MOE} {ways(expert=4)}",
    "36 channels cannot be split over fsdp 2 x expert 4",
    "base_emb_dim=40",
  ),
  (f"base_mlp_dim=67 {ways(tensor=2)}", "67 mlp channels cannot be split", "base_mlp_dim=68"),
  (
    f"base_mlp_dim=66 {ways(fsdp_transpose=4)}",
    "66 mlp channels cannot be split over fsdp_transpose 4; divisors are 1, 2, 3, 6",
    ways(fsdp_transpose=2),
  ),
  (
    f"base_mlp_dim=66 {ways(fsdp_transpose=2, tensor=2)}",
    "66 mlp channels cannot be split over fsdp_transpose 2 x tensor 2",
    "base_mlp_dim=68",
  ),
  (
    f"base_mlp_dim=33 global_parameter_scale=2 {ways(tensor=4)} base_num_kv_heads=4",
    "66 mlp channels cannot be split over tensor 4",
    "base_mlp_dim=34",
  ),
  (
    f"vocab_size=322 {ways(tensor=2, tensor_sequence=2)} base_num_kv_heads=4",
    "322 rows of the vocabulary cannot be split over tensor 2 x tensor_sequence 2",
    "vocab_size=324",
  ),
  (
    f"vocab_size=322 {ways(fsdp_transpose=4)}",
    "322 rows of the vocabulary cannot be split over fsdp_transpose 4",
    ways(fsdp_transpose=2),
  ),
  (
    "decoder_block=gpt3 base_num_kv_heads=4 trainable_position_size=70 "
    f"logical_axis_rules={{position:[data]}} {ways(data=4)}",
    "70 learned positions cannot be split over data 4",
    "trainable_position_size=72",
  ),
  (
    f"logical_axis_rules={{kv:[tensor_sequence],q_heads:[tensor],heads:[tensor]}} head_dim=12 "
    f"base_num_kv_heads=8 base_num_query_heads=8 {ways(tensor_sequence=8)}",
    "12 channels of a head cannot be split over tensor_sequence 8",
    "head_dim=16",
  ),
  # experts
  (f"{MOE} {ways(expert=8)}", "4 experts cannot be split over expert 8", ways(expert=4)),
  (
    f"{MOE} num_experts=6 {ways(expert=4)}",
    "6 experts cannot be split over expert 4; divisors are 1, 2, 3, 6",
    "num_experts=8",
  ),
  (f"{MLA} num_experts=6 {ways(expert=4)}", "6 experts cannot be split", ways(expert=2)),
  (
    f"{MOE} base_moe_mlp_dim=26 {ways(tensor=2, tensor_sequence=2)} base_num_kv_heads=4",
    "26 channels of an expert cannot be split over tensor 2 x tensor_sequence 2",
    "base_moe_mlp_dim=28",
  ),
  (
    f"{MOE} base_moe_mlp_dim=36 {ways(fsdp_transpose=8)}",
    "36 channels of an expert cannot be split over fsdp_transpose 8",
    ways(fsdp_transpose=4),
  ),
  (
    f"{MLA} base_shared_mlp_dim=26 {ways(tensor=4)}",
    "26 channels of shared experts cannot be split over tensor 4",
    "base_shared_mlp_dim=28",
  ),
  (
    f"{MOE} sparse_matmul=false capacity_factor=1.5 {ways(context=2)}",
    "the first ones find room with a capacity_factor; use false",
    "context_parallel_load_balance=false",
  ),
  # batches
  ("per_device_batch_size=0.5", "4 rows on 8 devices cannot be split 8 ways", ways(tensor=2)),
  (
    f"per_device_batch_size=0.25 {ways(tensor=2)}",
    "2 rows on 8 devices cannot be split 4 ways; use a multiple of 0.5",
    "per_device_batch_size=0.5",
  ),
  ("per_device_batch_size=0.3", "0.3 rows on 8 devices make 2.4", "per_device_batch_size=1"),
  ("per_device_batch_size=1.5", "12 rows on 8 devices cannot be", "per_device_batch_size=1"),
  (
    f"{MOE} {ways(expert=2)} per_device_batch_size=0.5",
    "4 rows on 8 devices cannot be split 8 ways; use a multiple of 1",
    "per_device_batch_size=1",
  ),
  (
    f"{ways(context=2)} per_device_batch_size=0.75",
    "6 rows on 8 devices cannot be split 4 ways; use a multiple of 0.5",
    "per_device_batch_size=0.5",
  ),
  (
    "eval_interval=5 eval_per_device_batch_size=0.5",
    "eval_per_device_batch_size: 4 rows on 8 devices cannot be split 8 ways",
    "eval_per_device_batch_size=1",
  ),
  # products, slices
  (ways(fsdp=4), "8 devices cannot be arranged as fsdp 4; make the product 8", ways(fsdp=8)),
  (ways(fsdp=4, data=4), "cannot be arranged as data 4 x fsdp 4", ways(fsdp=2)),
  (ways(fsdp=2, data=2), "as ici_fsdp_parallelism=4, or one of the sizes -1", ways(fsdp=-1)),
  (ways(tensor=3), "cannot be arranged as tensor 3; make the product a divisor", ways(tensor=1)),
  (ways(tensor=16), "8 devices cannot be arranged as tensor 16", ways(tensor=1)),
  (ways(data=-1), "ici_data_parallelism and ici_fsdp_parallelism are both -1", ways(data=1)),
  (
    f"{TWO} dcn_fsdp_parallelism=-1",
    "dcn_data_parallelism and dcn_fsdp_parallelism are both -1",
    "dcn_fsdp_parallelism=1",
  ),
  (ways(fsdp=0), "0 is out of range; use at least 1, or -1", ways(fsdp=-1)),
  (ways(slices=3), "8 devices do not make 3 equal slices; use 1, 2, 4, 8", ways(slices=4)),
  (
    f"{TWO} dcn_data_parallelism=3",
    "num_slices=2 cannot be arranged as data 3; make the product 2, as dcn_data_parallelism=2",
    "dcn_data_parallelism=2",
  ),
  (
    f"{TWO} {ways(fsdp=8)}",
    "4 devices of each slice cannot be arranged as fsdp 8; make the product 4",
    ways(fsdp=4),
  ),
  # axes and rules
  ("ici_tensr_parallelism=2", "did you mean 'ici_tensor_parallelism'?", ways(tensor=2)),
  (
    f"mesh_axes=[data,fsdp] {ways(tensor=2)}",
    "ici_tensor_parallelism=2, but mesh_axes does not name 'tensor'",
    ways(tensor=1),
  ),
  (
    "mesh_axes=[data,fsdp,data]",
    "'data' stands twice; name each axis once",
    "mesh_axes=[data,fsdp]",
  ),
  ("mesh_axes=[data,fspd]", "'fspd' is not known, did you mean 'fsdp'?", "mesh_axes=[data,fsdp]"),
  (
    "custom_mesh_and_rule=pure_fsdp logical_axis_rules={mlp:[tensor]}",
    "mlp names 'tensor', which mesh_axes does not; add it there",
    "mesh_axes=[data,fsdp,tensor]",
  ),
  (
    "logical_axis_rules={mlp:[fsdp]}",
    "embed and mlp of one array both go to mesh axis 'fsdp' of size 8",
    ways(fsdp=1, data=8),
  ),
  (
    f"logical_axis_rules={{embed:[tensor]}} {ways(tensor=2)}",
    "vocab and embed of one array both go to mesh axis 'tensor' of size 2",
    ways(tensor=1),
  ),
  (
    "logical_axis_rules={activation_length:[fsdp]}",
    "activation_batch and activation_length of one array both go to mesh axis 'fsdp'",
    ways(fsdp=1, data=8),
  ),
  (
    f"logical_axis_rules={{activation_kv:[tensor]}} {ways(tensor=2)}",
    "activation_heads and activation_kv of one array both go to mesh axis 'tensor' of size 2",
    ways(tensor=1),
  ),
  (
    f"{MOE} logical_axis_rules={{exp:[fsdp]}}",
    "exp and embed_no_exp of one array both go to mesh axis 'fsdp'",
    ways(fsdp=1, data=8),
  ),
  (
    "logical_axis_rules={embd:[fsdp]}",
    "'embd' is no logical axis, did you mean",
    "logical_axis_rules={embed:[fsdp]}",
  ),
  # lengths
  (
    f"max_target_length=60 {ways(context=8)}",
    "60 tokens cannot be split over context 8; use a multiple of 8",
    ways(context=1),
  ),
  (
    f"max_target_length=40 {ways(context=8)}",
    "40 tokens cannot be split over context 8 in two chunks each; use a multiple of 16",
    "max_target_length=48",
  ),
  (
    f"max_target_length=60 {ways(sequence=2, context=4)} context_parallel_load_balance=false",
    "60 tokens cannot be split over sequence 2 x context 4; use a multiple of 8",
    "max_target_length=64",
  ),
  (
    f"num_vocab_tiling=16 {ways(context=8)}",
    "over context 8 in 16 tiles each; use a multiple of 128, or num_vocab_tiling=1",
    "num_vocab_tiling=1",
  ),
  (
    f"{DELTA} {ways(context=2)}",
    "moves tokens, whose order delta nets and multi-token prediction go by; use false",
    "context_parallel_load_balance=false",
  ),
  # strategies
  (
    f"{ULYSSES} {ways(context=8)}",
    "4 query heads on a device cannot change places with 8 parts of the length; split it in 1, 2",
    ways(context=4),
  ),
  (
    f"{ULYSSES} {ways(context=4, tensor=2)}",
    "2 query heads on a device cannot change places with 4 parts of the length",
    "context_parallel_strategy=all_gather",
  ),
  (
    f"{ULYSSES} {ways(context=2)} context_parallel_load_balance=false",
    "has an effect only with context_parallel_strategy=all_gather or ring",
    "context_parallel_strategy=all_gather",
  ),
  (
    f"context_parallel_strategy=ring attention=dot_product {ways(context=2)}",
    "ring attention is computed by 'blockwise', not by 'dot_product'; use autoselected",
    "attention=autoselected",
  ),
  (
    f"logical_axis_rules={{activation_kv_heads:[]}} {ways(context=2, tensor=2)}",
    "activation_heads goes to ['tensor'] and activation_kv_heads to []; where the length is split",
    ways(context=1),
  ),
  (
    "context_parallel_strategy=ring",
    "only with a parallelism over an axis to which logical_axis_rules give",
    ways(context=2),
  ),
  # stages
  (
    f"{ways(stage=8)} per_device_batch_size=8",
    "4 layers cannot be split over stage 8; use 8",
    "base_num_decoder_layers=8",
  ),
  (
    f"base_num_decoder_layers=7 {ways(stage=2)}",
    "7 layers cannot be split over stage 2; use 6 or 8, or pipeline_parallel_layers=6",
    "pipeline_parallel_layers=6",
  ),
  (
    f"base_num_decoder_layers=9 {ways(stage=2)} num_pipeline_repeats=2",
    "9 layers cannot be split over stage 2 x 2 repeats; use 8 or 12, or pipeline_parallel_layers=8",
    "base_num_decoder_layers=12",
  ),
  (
    f"base_num_decoder_layers=9 {ways(stage=4)} pipeline_parallel_layers=7",
    "pipeline_parallel_layers: 7 layers cannot be split over stage 4; use 4 or 8",
    "pipeline_parallel_layers=8",
  ),
  (
    f"base_num_decoder_layers=9 {ways(stage=2)} pipeline_parallel_layers=4",
    "4 of the 9 layers in a row that are alike; use from 5 to 9",
    "pipeline_parallel_layers=8",
  ),
  (
    f"{MOE} first_num_dense_layers=1 decoder_block=deepseek3 base_num_kv_heads= {ways(stage=2)}",
    "3 layers cannot be split over stage 2; use 3 or 5, or pipeline_parallel_layers=2",
    "base_num_decoder_layers=5",
  ),
  (
    f"{ways(stage=2)} num_layers_per_pipeline_stage=3",
    "num_layers_per_pipeline_stage: 3, but 4 layers over stage 2 make 2; use that",
    "num_layers_per_pipeline_stage=2",
  ),
  (
    f"{ways(stage=4)} num_pipeline_microbatches=6 per_device_batch_size=6",
    "6 microbatches cannot go through 4 stages; use a multiple of 4, as 8",
    "num_pipeline_microbatches=4",
  ),
  (
    f"{ways(stage=4)} base_num_decoder_layers=8 num_pipeline_repeats=2 per_device_batch_size=2 "
    "pipeline_delay_activation_forwarding=true num_pipeline_microbatches=4",
    "4 microbatches cannot go through 4 stages 2 times; use a multiple of 4, as 8",
    "num_pipeline_microbatches=8",
  ),
  (
    f"{ways(stage=4)} num_pipeline_microbatches=8",
    "8 rows on 8 devices do not make 8 microbatches split 2 ways; use a multiple of 2",
    "per_device_batch_size=2",
  ),
  (
    f"{ways(stage=2)} eval_interval=5 per_device_batch_size=4 eval_per_device_batch_size=1 "
    "num_pipeline_microbatches=8",
    "eval_per_device_batch_size: 8 rows on 8 devices do not make 8 microbatches split 4 ways",
    "eval_per_device_batch_size=4",
  ),
  (
    f"{ways(stage=2)} logical_axis_rules={{layers:[]}}",
    "layers goes to []; with stage 2 it must go to [stage]",
    ways(stage=1),
  ),
  # what types of arrays cannot say
  (f"shard_mode=explicit {ways(stage=2)}", "explicit: one program of all stages", ways(stage=1)),
  (
    f"shard_mode=explicit {DELTA} {ways(context=2)} context_parallel_load_balance=false",
    "explicit: what delta nets and multi-token prediction take from neighbours in a split length",
    "shard_mode=auto",
  ),
  # what is not there yet, or does nothing
  (ways(diloco=2), "parallelism over 'diloco' is not there yet; use 1", ways(diloco=1)),
  (
    ways(autoregressive=8),
    "4 query heads cannot be split over autoregressive 8; divisors are 1, 2, 4",
    ways(autoregressive=2),
  ),
  (
    f"{ways(context_autoregressive=8)} max_target_length=36",
    "36 tokens cannot be split over context_autoregressive 8; use a multiple of 8",
    "max_target_length=80",
  ),
  (
    f"{ways(context_autoregressive=2)} attention=dot_product",
    "a cache that 'context_autoregressive' splits is attended by 'blockwise', not by 'dot_product'",
    "attention=autoselected",
  ),
  (
    "shard_optimizer_over_data=true",
    "has an effect only with ici_data_parallelism (or that over slices) above 1",
    ways(data=2),
  ),
  (
    f"{ways(data=2)} shard_optimizer_over_data=true opt_type=sgd",
    "has an effect only with another opt_type than sgd, which keeps no state",
    "opt_type=adamw",
  ),
]


def words(*texts):
  """key=value of all, the last one of each key; an empty value leaves the key away."""
  found = dict(word.split("=", 1) for text in texts for word in text.split())
  return [f"{key}={value}" for key, value in found.items() if value]


@functools.cache
def refused(keys):
  with pytest.raises(ConfigErrors) as raised:
    config.load(words(COMMON, keys), {})
  return raised.value.lines


@pytest.mark.parametrize(("keys", "says", "fix"), BROKEN, ids=[keys for keys, _, _ in BROKEN])
def test_it_is_refused_in_a_short_sentence(keys, says, fix):
  lines = refused(keys)
  assert any(says in line for line in lines), lines
  assert all(len(line) <= 300 for line in lines), lines
  key, value = fix.split()[0].split("=", 1)
  assert any(value in line or key in line or key.split("_")[1] in line for line in lines), lines


def test_there_are_sixty_of_them():
  assert len({keys for keys, _, _ in BROKEN}) == len(BROKEN) >= 60


def repaired(keys, fix):
  """What is typed once the remedy is; a key that does not exist is left away."""
  kept = [word for word in keys.split() if "tensr" not in word]
  return words(COMMON, *kept, fix)


@pytest.mark.parametrize(("keys", "says", "fix"), BROKEN, ids=[keys for keys, _, _ in BROKEN])
def test_what_makes_it_right_is_accepted(keys, says, fix):
  config.load(repaired(keys, fix), {})


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "says", "fix"), BROKEN, ids=[keys for keys, _, _ in BROKEN])
def test_and_can_be_built_and_traced(keys, says, fix):
  built = program.build(config.load(repaired(keys, fix), {}), jax.devices()[:8])
  built.step.trace(built.state, built.batch(built.config.training.global_batch(8)))
