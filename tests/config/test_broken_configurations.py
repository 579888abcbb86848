"""Ways to get a configuration wrong, each refused in one short line that says what is right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxtext import program, trainer
from maxtext.errors import ConfigError, UserError
from tests.data import vocabularies

ON_8 = "hardware=cpu devices=8 "

# What is typed (split at spaces), and what the one line of complaint must contain.
COMMAND_LINES = [
  # names
  ("learning_rat=1e-4", "learning_rat: no such key, did you mean 'learning_rate'?"),
  ("Steps=3", "Steps: no such key, did you mean 'steps'?"),
  ("ici_tensor_paralelism=2", "did you mean 'ici_tensor_parallelism'?"),
  ("zzzz=1", "zzzz: no such key", "python -m maxtext.explain"),
  ("training.steps=3", "training.steps: keys stand alone here; write steps=VALUE"),
  ("training=3", "training: is a section", "steps=VALUE"),
  ("base_config=other.yml", "base_config: belongs in a file", "as the first argument"),
  ("--steps=3", "--steps=3: settings have no dashes; write steps=3"),
  ("--run-name=x", "write run_name=x"),
  ("--steps", "write steps=VALUE"),
  ("steps", "steps: has no value; write steps=VALUE"),
  ("steps = 3", "steps: write steps=3, without spaces"),
  ("steps =3", "steps: write steps=3, without spaces"),
  ("=3", "=: is not the name of a key", "write key=value"),
  ("st-eps=3", "st-eps: is not the name of a key, did you mean 'steps'?"),
  ("base.yml base.yml", "base.yml: is a second file", "base_config"),
  ("base.yml step", "step: is neither key=value", "did you mean 'steps'?"),
  ("steps=3 steps=4", "steps: '4' here, but steps=3 on the same command line; remove one"),
  # files and presets
  ("absent.yml", "'absent.yml': no such file", "give the path of a YAML file"),
  ("bse.yml", "'bse.yml': no such file, did you mean 'base.yml'?"),
  ("configs/bas.yml", "'configs/bas.yml': no such file, did you mean 'configs/base.yml'?"),
  ("configs", "configs", "is a folder; name a file in it"),
  ("model_name=llama2-7", "'llama2-7' is no model preset, did you mean 'llama2-7b'?"),
  (
    "custom_mesh_and_rule=fsdp",
    "'fsdp' is no set of mesh axes and rules, did you mean '2d_fsdp'? (configs/sharding: ",
  ),
  (
    "custom_mesh_and_rule=pure_fsdp ici_tensor_parallelism=2",
    "ici_tensor_parallelism=2, but mesh_axes does not name 'tensor'; add it there, or set",
  ),
  ("model_name=../base", "'../base' is no model preset", "configs/models:"),
  ("decoder_block=lama2", "decoder_block: 'lama2' is no decoder block, did you mean 'llama2'?"),
  ("decoder_block=./own.yml", "decoder_block: './own.yml': no such file"),
  (
    "decoder_block=",
    "decoder_block: '' is no decoder block (custom, ",
  ),
  # whole numbers
  ("steps=ten", "steps: 'ten' is not a whole number; write digits, as 10"),
  ("steps=1e3", "steps: '1e3' is not written as a whole number; write 1000"),
  ("steps=10.0", "write 10"),
  ("steps=2.5", "steps: '2.5' is not a whole number"),
  ("steps=010", "steps: '010' is not written as a number; write 10"),
  ("steps=0x10", "steps: '0x10' is not a whole number"),
  ("steps=1__0", "steps: '1__0' is not a whole number"),
  ("steps='10'", "is not written as a number; write 10"),
  ("steps=true", "steps: 'true' is not a whole number"),
  ("steps=nan", "steps: 'nan' is not a whole number"),
  ("steps=inf", "steps: 'inf' is not a whole number"),
  ("steps=", "steps: has no value; write a whole number, at least 1"),
  ("steps=null", "steps: 'null' is not a whole number"),
  ("steps=[1,2]", "steps: is a list; write a whole number"),
  ("steps={a:1}", "steps: is a mapping; write a whole number"),
  ("steps=0", "steps: 0 is out of range; use at least 1"),
  ("steps=-5", "steps: -5 is out of range; use at least 1"),
  ("steps=99999999999", "steps: 99999999999 is out of range; use at most 2147483647"),
  ("steps=" + "9" * 5000, "steps: '999", "is too large; use at most 2147483647"),
  ("base_emb_dim=-256", "base_emb_dim: -256 is out of range; use at least 1"),
  ("base_num_decoder_layers=0", "base_num_decoder_layers: 0 is out of range"),
  ("vocab_size=-1", "vocab_size: -1 is out of range; use at least 1"),
  ("checkpoint_period=0", "checkpoint_period: 0 is out of range; use at least 1"),
  ("eval_interval=0", "eval_interval: 0 is out of range; use at least 1, or -1"),
  ("num_epoch=-2", "num_epoch: -2 is out of range; use at least 1, or -1"),
  ("data_shuffle_seed=-1", "data_shuffle_seed: -1 is out of range; use at least 0"),
  ("init_weights_seed=99999999999", "init_weights_seed: 99999999999 is out of range"),
  ("max_target_length=0", "max_target_length: 0 is out of range"),
  ("gradient_accumulation_steps=0", "gradient_accumulation_steps: 0 is out of range"),
  ("sliding_window_size=0", "sliding_window_size: 0 is out of range; use at least 1"),
  (
    "tokenizer_type=bpe tokenizer_vocab_size=100",
    "tokenizer_vocab_size: 100 is out of range; use at least 260",
  ),
  ("num_slices=0", "num_slices: 0 is out of range"),
  # numbers
  ("learning_rate=high", "learning_rate: 'high' is not a number; write digits, as 0.1 or 1e-4"),
  ("learning_rate='1e-4'", "is not a number; write 0.0001"),
  ("learning_rate=0,001", "learning_rate: '0,001' is not a number; write 0.001"),
  ("warmup_steps_fraction=5%", "warmup_steps_fraction: '5%' is not a number; write 0.05"),
  ("learning_rate=nan", "learning_rate: 'nan' is not a finite number"),
  ("learning_rate=1e999", "learning_rate: '1e999' is not a finite number"),
  ("learning_rate=1e39", "learning_rate: '1e39' is not a finite number in float32"),
  ("learning_rate=-1", "learning_rate: -1.0 is out of range; use at least 0"),
  (
    "warmup_steps_fraction=1.5",
    "warmup_steps_fraction: 1.5 is out of range; use at least 0 and at most 1",
  ),
  ("dropout_rate=1", "dropout_rate: 1 drops everything; use a fraction below 1"),
  ("adam_b2=1", "adam_b2: 1 never forgets", "use a fraction below 1"),
  ("adam_eps=0", "adam_eps: 0.0 is out of range; use above 0"),
  ("per_device_batch_size=0", "per_device_batch_size: 0.0 is out of range; use above 0"),
  ("eval_fraction=0.9", "eval_fraction: 0.9 is out of range; use at least 0 and at most 0.5"),
  ("decode_sampling_strategy=nucleus decode_sampling_nucleus_p=0", "out of range; use above 0"),
  # choices, booleans, lists, texts
  (
    "attention=blokwise",
    "attention: 'blokwise' is not known, did you mean 'blockwise'?",
    "dot_product",
  ),
  (
    "attention=paged",
    "attention: 'paged' is not known",
    "(autoselected, dot_product, blockwise, ragged, flash, cudnn_flash)",
  ),
  ("sa_block_q=64", "sa_block_q: 64 is out of range; use at least 128"),
  ("sa_block_q=700", "sa_block_q: 700 is not a multiple of 128", "use 640"),
  (
    "sa_block_kv_compute=384",
    "sa_block_kv_compute=384 does not divide sa_block_kv=512; use a divisor",
  ),
  ("sa_block_kv_dkv=640", "sa_block_kv_dkv_compute=512 does not divide sa_block_kv_dkv=640"),
  ("attention=dot_product sa_block_q=256", "an effect only with attention=flash or autoselected"),
  ("sa_use_fused_bwd_kernel=true sa_block_q_dq=256", "only with sa_use_fused_bwd_kernel=false"),
  (
    "context_parallel_strategy=ring",
    "only with a parallelism over an axis to which logical_axis_rules",
  ),
  ("context_parallel_strategy=rign", "did you mean 'ring'?"),
  ("dtype=fp32", "dtype: 'fp32' is not known", "(float32, bfloat16)"),
  ("opt_type=adam", "opt_type: 'adam' is not known, did you mean 'adamw'? (adamw, sgd)"),
  ("lr_schedule_type=cosin", "did you mean 'cosine'?"),
  ("base_output_directory=gs://bucket/runs", "needs a package; pip install gcsfs"),
  ("base_output_directory=ftp://place/runs", "runs are kept in a file system or at gs://, s3://"),
  ("jax_cache_dir=gs://bucket/xla", "a mount, such as Cloud Storage FUSE, makes files of it"),
  ("jax_cache_dir=~nosuchuser/x", "jax_cache_dir: '~nosuchuser/x': there is no such"),
  ("record_internal_nn_metrics=true enable_tensorboard=false", "only with enable_tensorboard=true"),
  ("num_vocab_tiling=5", "num_vocab_tiling: 5 tiles do not cut 256 tokens evenly; use 4, or 0"),
  ("query_proj=offload", "query_proj: has an effect only with remat_policy=custom"),
  ("remat_policy=custom decoder_layer_input=remat", "decoder_layer_input: 'remat' is not known"),
  (
    ON_8 + "remat_policy=minimal_offloaded shard_mode=explicit",
    "explicit: what moves between the hosts' memory and the devices'",
  ),
  ("remat_policy=ful", "remat_policy: 'ful' is not known, did you mean 'full'?"),
  ("hardware=tpus", "hardware: 'tpus' is not known, did you mean 'tpu'?"),
  ("dataset_type=hf", "dataset_type: hf reads a saved dataset; set hf_path=FOLDER"),
  ("dataset_type=grain", "dataset_type: grain reads files; set grain_train_files='FOLDER/*"),
  (
    "dataset_type=grain grain_train_files=. data_errors=1%",
    "data_errors: '1%' is neither stop, nor a number, as 100, nor a share",
  ),
  ("dataset_type=grain grain_train_files=bsae.yml", "no such file, did you mean 'base.yml'?"),
  ("dataset_type=grain grain_train_files=x/*,1;base.yml,1", "files: 'x/*': no such file; name"),
  ("hf_access_token=x", "hf_access_token: a secret stands in no configuration and no log; set HF"),
  ("hf_eval_files=base.yml", "hf_eval_files: has an effect only with hf_train_files"),
  (
    "dataset_type=hf hf_path=me/set hf_train_files=base.yml",
    "hf_path: with hf_train_files it is the kind of the files: arrow, json, parquet, text, or",
  ),
  ("hf_path=.", "hf_path: has an effect only with dataset_type=hf"),
  ("grain_worker_count=2", "grain_worker_count: has an effect only with dataset_type=grain or hf"),
  ("dataset_type=Text", "dataset_type: 'Text' is not known, did you mean 'text'?"),
  ("mu_dtype=int8", "mu_dtype: 'int8' is not known"),
  ("packing=maybe", "packing: 'maybe' is neither true nor false; write one of these"),
  ("packing=1", "packing: '1' is neither true nor false"),
  ("packing=", "packing: has no value; write true or false"),
  ("mlp_activations=[swish,linear]", "mlp_activations: 'swish' is not known (silu, gelu"),
  (
    "mlp_activations=silu,linear",
    "mlp_activations: 'silu,linear' is not a list; write [silu,linear]",
  ),
  (
    "mlp_activations=[silu",
    "mlp_activations: '[silu' is not a list; its brackets or quotes are not closed",
  ),
  (
    "mlp_activations=[silu,gelu]",
    "mlp_activations: [silu, gelu] must be one activation, as [gelu]",
  ),
  ("mlp_activations=[]", "mlp_activations: [] must be one activation"),
  ("mlp_activations=", "mlp_activations: has no value; write [] for an empty list"),
  ("adamw_mask=[norm(]", "adamw_mask: 'norm(' is not a regular expression", "correct it"),
  ("resume_changes=[step]", "resume_changes: 'step' is no key, did you mean 'steps'?"),
  ("run_name=a/b", "run_name: 'a/b' cannot name a folder; use"),
  ("run_name=..", "run_name: '..' cannot name a folder"),
  ("run_name=" + "x" * 200, "cannot name a folder; use at most 100"),
  ("base_output_directory=", "base_output_directory: is empty; name a folder, for instance runs"),
  ("run_name=null", "run_name: null means nothing here; write '' to leave it empty"),
  # the model
  (
    "base_num_kv_heads=3",
    "8 query heads cannot share 3 kv heads evenly",
    "one of 1, 2, 4, 8",
    "configs/base.yml:",
  ),
  (
    "base_num_query_heads=6 head_dim=32",
    "base_num_query_heads: 6 query heads cannot share 4 kv heads",
    "(base_num_kv_heads=4, configs/base.yml:",
  ),
  ("head_dim=", "head_dim: has no value; write a whole number, at least 1, or null"),
  ("base_emb_dim=100", "base_emb_dim: width 100 is not a multiple of 8 heads", "or set head_dim"),
  ("head_dim=33", "head_dim: a head dimension of 33 is odd", "make it even"),
  ("base_emb_dim=24", "base_emb_dim: a head dimension of 3 is odd"),
  ("global_parameter_scale=3", "global_parameter_scale: 3 is not a power of two; use 2 or 4"),
  ("rope_max_timescale=0.5", "rope_max_timescale: 0.5 must be above rope_min_timescale=1"),
  (
    "partial_rotary_factor=0.3",
    "partial_rotary_factor: 0.3 of 32 channels is 9, and rotary positions turn pairs; use",
  ),
  ("partial_rotary_factor=0", "partial_rotary_factor: 0 is not above 0"),
  ("rope_type=llama3", "rope_type: 'llama3' is not known, did you mean 'llama3.1'?"),
  ("rope_type=yarn rope_factor=0.5", "rope_factor: 0.5 is not at least 1"),
  ("rope_type=yarn beta_slow=50", "beta_slow: beta_fast=32 must not be below beta_slow=50"),
  ("rope_type=yarn beta_fast=0", "beta_fast: 0.0 is out of range; use above 0"),
  (
    "rope_type=yarn rope_linear_scaling_factor=2",
    "rope_linear_scaling_factor: 2 and a scaling both stretch positions; leave one away",
  ),
  ("rope_factor=8", "rope_factor: has an effect only with rope_type=llama3.1, yarn or dynamic"),
  (
    "rope_type=llama3.1 rope_use_scale=false rope_factor=8",
    "rope_factor: has an effect only with rope_use_scale=true",
  ),
  ("rope_type=llama3.1 beta_fast=8", "beta_fast: has an effect only with rope_type=yarn"),
  ("rope_use_scale=false", "rope_use_scale: has an effect only with rope_type=llama3.1"),
  ("decoder_block=gpt3 rope_factor=8", "rope_factor: decoder block 'gpt3' does not use it"),
  (
    "vocab_size=100",
    "vocab_size: 100 rows are fewer than the tokenizer's 259 tokens; use at least 259",
  ),
  (
    "decoder_block=gpt3 rope_max_timescale=500000",
    "rope_max_timescale: decoder block 'gpt3' does not use it",
  ),
  (
    "decoder_block=gpt3 mlp_activations=[relu]",
    "mlp_activations: decoder block 'gpt3' does not use it",
  ),
  (
    "trainable_position_size=4096",
    "trainable_position_size: decoder block 'llama2' does not use it",
  ),
  (
    "decoder_block=gpt3 max_target_length=4096",
    "max_target_length: 4096 tokens are longer than the learned positions",
    "use at most 2048",
  ),
  # experts
  ("num_experts=4", "num_experts: decoder block 'llama2' does not use it"),
  (
    "decoder_block=mixtral base_mlp_dim=64 base_moe_mlp_dim=32",
    "base_mlp_dim: none of this model's layers uses it; leave it away (base_moe_mlp_dim=32",
  ),
  (
    "decoder_block=mixtral first_num_dense_layers=99 num_experts=4",
    "num_experts: none of this model's layers uses it",
  ),
  (
    "layer_pattern=[full] sliding_window_size=4",
    "sliding_window_size: none of this model's layers uses it; leave it away (layer_pattern=[full]",
  ),
  (
    "decoder_block=moe num_experts_per_tok=9",
    "num_experts_per_tok: 9 of 8 experts; use at most all",
  ),
  (
    "decoder_block=moe n_routing_groups=3 topk_routing_group=1",
    "n_routing_groups: 3 groups do not divide 8 experts",
  ),
  ("decoder_block=moe n_routing_groups=4", "n_routing_groups: has an effect only with a topk_"),
  (
    "decoder_block=moe n_routing_groups=4 topk_routing_group=5",
    "topk_routing_group: 5 of 4 groups",
  ),
  (
    "decoder_block=moe n_routing_groups=8 topk_routing_group=1",
    "topk_routing_group: 1 groups of 1 experts hold fewer than the 2 active ones; raise it",
  ),
  (
    "decoder_block=moe n_routing_groups=8 topk_routing_group=4 routed_bias=true",
    "n_routing_groups: 8 groups of one expert have no two best; use fewer",
  ),
  (
    "decoder_block=moe shared_experts=2 base_shared_mlp_dim=30",
    "shared_experts: has an effect only with base_shared_mlp_dim=null",
  ),
  (
    "decoder_block=moe capacity_factor=1.5",
    "capacity_factor: has an effect only with sparse_matmul=false",
  ),
  (
    "decoder_block=moe sparse_matmul=false capacity_factor=0",
    "capacity_factor: 0.0 is out of range; use above 0, or -1",
  ),
  (
    "decoder_block=moe sparse_matmul=false megablox=false",
    "megablox: has an effect only with sparse_matmul=true",
  ),
  ("sparse_matmul=false", "sparse_matmul: has an effect only with a decoder_block that has exp"),
  (
    "load_balance_loss_weight=0.1",
    "load_balance_loss_weight: has an effect only with a decoder_block that has experts",
  ),
  (
    "decoder_block=moe interleave_moe_layer_step=9 load_balance_loss_weight=0.1",
    "load_balance_loss_weight: has an effect only with a decoder_block that has experts",
  ),
  (
    "decoder_block=moe routed_bias_update_rate=0.1",
    "routed_bias_update_rate: has an effect only with routed_bias=true",
  ),
  (
    "decoder_block=moe layer_pattern=[layer] first_num_dense_layers=1",
    "first_num_dense_layers: has an effect only with layer_pattern=[]",
  ),
  (
    "decoder_block=moe use_random_routing=true float32_gate_logits=false",
    "float32_gate_logits: has an effect only with use_random_routing=false",
  ),
  (
    "decoder_block=moe routed_score_func=sigmoids",
    "routed_score_func: 'sigmoids' is not known, did you mean 'sigmoid'?",
  ),
  (
    ON_8 + "decoder_block=moe num_experts=6 ici_expert_parallelism=4",
    "num_experts: 6 experts cannot be split over expert 4; divisors are 1, 2, 3, 6",
  ),
  (
    ON_8 + "decoder_block=moe custom_mesh_and_rule=expert_as_context ici_fsdp_parallelism=1 "
    "ici_expert_parallelism=8 max_target_length=20",
    "max_target_length: 20 tokens cannot be split over expert 8; use a multiple of 8",
  ),
  (
    ON_8 + "ici_tensor_sequence_parallelism=4 max_target_length=30",
    "max_target_length: 30 tokens cannot be split over tensor_sequence 4; use a multiple of 4",
  ),
  (
    ON_8 + "shard_optimizer_over_data=true",
    "shard_optimizer_over_data: has an effect only with ici_data_parallelism",
  ),
  # keys that contradict each other, or do nothing
  (
    "load_parameters_path=. load_full_state_path=.",
    "load_parameters_path: a run starts from parameters or from a full",
    "leave one",
  ),
  (
    "target_eval_loss=2",
    "target_eval_loss: without evaluation no loss can reach the target; set eval_interval",
  ),
  ("eval_steps=4", "eval_steps: has an effect only with an eval_interval of at least 1"),
  (
    "lr_schedule_type=wsd warmup_steps_fraction=0.6 wsd_decay_steps_fraction=0.6",
    "together more than the whole",
  ),
  (
    "wsd_decay_steps_fraction=0.2",
    "wsd_decay_steps_fraction: has an effect only with lr_schedule_type=wsd",
  ),
  ("opt_type=sgd adam_b1=0.8", "adam_b1: has an effect only with opt_type=adamw"),
  (
    "lr_schedule_type=constant learning_rate_final_fraction=0.5",
    "another lr_schedule_type than constant",
  ),
  (
    "packing=false grain_packing_type=best_fit",
    "grain_packing_type: has an effect only with packing=true",
  ),
  ("tokenizer_vocab_size=8000", "tokenizer_vocab_size: has an effect only with tokenizer_type=bpe"),
  (
    "decode_sampling_top_k=5",
    "decode_sampling_top_k: has an effect only with decode_sampling_strategy=topk",
  ),
  (
    "decode_sampling_temperature=0.5",
    "decode_sampling_temperature: has an effect only with another",
  ),
  ("prompt=a prompts_file=b", "prompt: give one prompt, or a prompts_file with one a line"),
  (
    "enable_checkpointing=false save_checkpoint_on_start=true",
    "has an effect only with enable_checkpointing=true",
  ),
  (
    "dataset_type=synthetic dataset_path=.",
    "dataset_path: synthetic data reads no files; set dataset_type=text",
  ),
  (
    "tokenizer_path=base.yml",
    "tokenizer_path: the byte tokenizer reads no file; set tokenizer_type=huggingface,",
  ),
  ("devices=4", "devices: virtual devices exist on CPUs only; set hardware=cpu"),
  # files that are not there
  (
    "tokenizer_type=bpe tokenizer_path=absent.json",
    "tokenizer_path: 'absent.json': no such file",
    "to train one",
  ),
  (
    "dataset_path=absent",
    "dataset_path: 'absent': no such file or folder; name a file, folder or glob",
  ),
  ("dataset_path=*.txt", "dataset_path: '*.txt': no such file or folder"),
  (
    "load_parameters_path=absent",
    "load_parameters_path: 'absent': no such folder; name a run's folder",
  ),
  (
    "load_full_state_path=.",
    "load_full_state_path: '.': there is no checkpoint in it; name a run's",
  ),
  (
    "load_parameters_path=.",
    "load_parameters_path: '.': there is no checkpoint in it; name a run's",
  ),
  ("load_full_state_path=absent", "load_full_state_path: 'absent': no such folder"),
  (
    "base_output_directory=/dev/null/runs",
    "base_output_directory: '/dev/null/runs': /dev/null is a file",
  ),
  # devices, meshes and batches
  (
    ON_8 + "ici_tensor_parallelism=3",
    "ici_tensor_parallelism: 8 devices cannot be arranged as tensor 3",
    "make the product a divisor of 8",
  ),
  (
    ON_8 + "ici_fsdp_parallelism=4",
    "ici_fsdp_parallelism: 8 devices cannot be arranged as fsdp 4",
    "-1",
  ),
  (ON_8 + "ici_tensor_parallelism=16", "8 devices cannot be arranged as tensor 16"),
  (
    ON_8 + "ici_tensor_parallelism=8",
    "4 kv heads cannot be split over tensor 8; divisors are 1, 2, 4",
  ),
  (
    ON_8 + "ici_tensor_parallelism=2 base_mlp_dim=767",
    "base_mlp_dim: 767 mlp channels cannot be split over tensor 2",
  ),
  (ON_8 + "base_emb_dim=100 head_dim=32", "base_emb_dim: 100 channels cannot be split over fsdp 8"),
  (
    ON_8 + "per_device_batch_size=0.3",
    "per_device_batch_size: 0.3 rows on 8 devices make 2.4; use a multiple of 1",
  ),
  (
    ON_8 + "per_device_batch_size=0.5",
    "per_device_batch_size: 4 rows on 8 devices cannot be split 8 ways",
  ),
  (
    ON_8 + "eval_interval=5 eval_per_device_batch_size=0.5",
    "eval_per_device_batch_size: 4 rows on 8 devices",
  ),
  (ON_8 + "num_slices=3", "num_slices: 8 devices do not make 3 equal slices"),
  (
    ON_8 + "dcn_fsdp_parallelism=2",
    "dcn_fsdp_parallelism: num_slices=1 cannot be arranged as fsdp 2",
  ),
  (
    "ici_data_parallelism=-1",
    "ici_data_parallelism and ici_fsdp_parallelism are both -1; only one may take the rest",
  ),
  (
    "ici_tensor_parallelism=-2",
    "ici_tensor_parallelism: -2 is out of range; use at least 1, or -1",
  ),
  (
    "ici_diloco_parallelism=2",
    "ici_diloco_parallelism: 2: parallelism over 'diloco' is not there yet; use 1",
  ),
  (
    "pipeline_parallel_layers=5 base_num_decoder_layers=4",
    "pipeline_parallel_layers: 5 of the 4 layers in a row that are alike; use from 2 to 4",
  ),
  (
    "dcn_diloco_parallelism=-1",
    "dcn_diloco_parallelism: -1: parallelism over 'diloco' is not there yet",
  ),
  ("mesh_axes=[data,fsdp,data]", "mesh_axes: 'data' stands twice; name each axis once"),
  ("mesh_axes=[data,tensr]", "mesh_axes: 'tensr' is not known, did you mean 'tensor'?"),
  (
    "mesh_axes=[data,fsdp] ici_tensor_parallelism=2",
    "ici_tensor_parallelism=2, but mesh_axes does not name 'tensor'",
  ),
  ("mesh_axes=[]", "mesh_axes: is empty; name at least one axis"),
  (
    "logical_axis_rules={embd:[fsdp]}",
    "logical_axis_rules: 'embd' is no logical axis, did you mean 'embed'?",
  ),
  (
    "logical_axis_rules={embed:[fsd]}",
    "logical_axis_rules: embed: 'fsd' is not known, did you mean 'fsdp'?",
  ),
  ("logical_axis_rules={embed:[fsdp,fsdp]}", "logical_axis_rules: embed names 'fsdp' twice"),
  ("logical_axis_rules=[embed,fsdp]", "logical_axis_rules: is a list; write a mapping"),
  (
    "logical_axis_rules=embed",
    "logical_axis_rules: 'embed' is not a mapping; write one, as {embed: [fsdp]}",
  ),
  (
    "override_logical_axis_rules=true",
    "override_logical_axis_rules: leaves no rule at all; write logical_axis_rules too",
  ),
  ("per_device_batch_size=1e30", "2.56e+32 tokens per device", "use fewer rows"),
  (
    "gradient_accumulation_steps=2000000000",
    "gradient_accumulation_steps: 4.1e+12 tokens per device and step are more than can be counted",
  ),
  # what is not a setting at all
  ("-help", "-help: no such option; write key=value, or --help"),
  ("--version", "--version: no such option; write key=value, or --help"),
  ("--learning-rat=1", "--learning-rat=1: no such option, did you mean 'learning_rate'?"),
  ("help", "'help': no such file", "--help"),
  ("steps= 3", "steps: write steps=3, without spaces around the ="),
  # numbers that float32 has no room for
  ("adam_eps=1e-50", "adam_eps: '1e-50' is nothing in float32; write one of at least 1.2e-38"),
  ("learning_rate=-1e-320", "learning_rate: '-1e-320' is nothing in float32"),
  # keys that do nothing with this data
  *(
    (f"dataset_type=synthetic {key}", "has an effect only with another dataset_type than synthetic")
    for key in (
      "packing=false",
      "add_eos=false",
      "enable_data_shuffling=false",
      "eval_fraction=0.1",
    )
  ),
  (
    "dataset_type=synthetic grain_packing_type=best_fit",
    "grain_packing_type: has an effect only with another dataset_type than synthetic",
  ),
  ("text_column=body", "text_column: has an effect only with a dataset_path, since"),
  (
    "eval_interval=5 eval_fraction=0",
    "eval_interval: with eval_fraction=0 no document is held out to evaluate; set it above 0",
  ),
]

# What is typed where `loop` is a link to itself and `dangling` one to nowhere.
LINKS = [
  ("base_output_directory=loop", "'loop': loop is a link that leads nowhere; name a folder"),
  ("base_output_directory=dangling/x", "'dangling/x': dangling is a link that leads nowhere"),
  ("jax_cache_dir=loop", "jax_cache_dir: 'loop': loop is a link that leads nowhere"),
  ("dataset_path=loop", "dataset_path: 'loop': no such file or folder"),
  ("dataset_path=dangling", "dataset_path: 'dangling': no such file or folder"),
  ("metrics_file=.", "metrics_file: '.': is a folder; name a file"),
  ("metrics_file=dangling/x", "dangling is a link that leads nowhere; name a file"),
  ("metrics_file=base.yml/x", "metrics_file: 'base.yml/x': base.yml is a file, not a folder; name"),
  ("report_file=.", "report_file: '.': is a folder; name a file"),
  ("report_file=dangling/x", "dangling is a link that leads nowhere; name a file"),
  ("report_file=gone/x", "report_file: 'gone/x': there is no folder gone; make it, or name"),
  ("report_file=locked/x", "report_file: 'locked/x': locked cannot be written; name a file that"),
  ("report_file=~nosuchuser/x", "report_file: '~nosuchuser/x': there is no such user"),
  ("base_output_directory=" + "x" * 300, "has a name of more than 255 bytes; name a shorter one"),
  ("run.yml", "'run.yml': is a link that leads nowhere; give the path of a YAML file"),
  ("base_output_directory=locked/runs", "locked cannot be written; name a folder that can"),
  ("metrics_file=locked/x", "metrics_file: 'locked/x': locked cannot be written; name a file that"),
]

# The text of run.yml, and what the one line of complaint must contain.
FILES = [
  (
    "steps: 3\nlearning_rat: 1\n",
    "run.yml:2  learning_rat: no such key, did you mean 'learning_rate'?",
  ),
  ("steps: 3\nsteps: 4\n", "run.yml:2  'steps' stands here and on line 1 too; keep one"),
  ("steps: 3\ntraining:\n  steps: 4\n", "run.yml:3  steps: stands on line 1 too", "keep one"),
  ("optimizer:\n  steps: 4\n", "run.yml:2  steps: belongs to section training, not optimizer"),
  ("optimizer: 3\n", "run.yml:1  optimizer: is a section; write its keys below it"),
  ("training:\n  stepss: 3\n", "run.yml:2  stepss: no such key, did you mean 'steps'?"),
  (
    "learning_rate: '1e-4'\n",
    "run.yml:1  learning_rate: '1e-4' is text, because of its quotes; write 1e-4 without",
  ),
  ("steps: '10'\n", "run.yml:1  steps: '10' is text, because of its quotes; write 10 without"),
  ("packing: 'true'\n", "run.yml:1  packing: 'true' is text, because of its quotes"),
  ("steps:\n", "run.yml:1  steps: has no value; write a whole number"),
  ("run_name:\n", "run.yml:1  run_name: has no value; write '' to leave it empty"),
  ("steps: [10]\n", "run.yml:1  steps: is a list; write a whole number"),
  ("steps: {a: 1}\n", "run.yml:1  steps: is a mapping; write a whole number"),
  (
    "steps: ${max_target_length}\n",
    "run.yml:1  steps: '${max_target_length}' is not a whole number",
  ),
  ("run_name: x-${steps}\n", "run.yml:1  run_name: 'x-${steps}' cannot name a folder"),
  (
    "base_output_directory: ${HOME}/runs\n",
    "run.yml:1  base_output_directory: '${HOME}/runs'",
    "nothing is filled in",
  ),
  (
    "mlp_activations: {a: b}\n",
    "run.yml:1  mlp_activations: is a mapping; write a list, as [a, b]",
  ),
  (
    "mlp_activations: [[silu], linear]\n",
    "run.yml:1  mlp_activations: is a list; write one of silu",
  ),
  (
    "logical_axis_rules: [[embed, [fsdp]], [embed, [tensor]]]\n",
    "run.yml:1  logical_axis_rules: 'embed' stands twice",
  ),
  ("logical_axis_rules:\n- embed\n", "run.yml:1  logical_axis_rules: is a list; write a mapping"),
  ("- steps\n- 3\n", "run.yml:1  the file holds a list; it must hold lines of `key: value`"),
  ("just words\n", "run.yml:1  the file holds text; it must hold lines of `key: value`"),
  ("steps: 3\n\tsteps: 4\n", "run.yml:2  not YAML", "with spaces"),
  ("steps: [3\n", "run.yml:2  not YAML", "check indentation, brackets and quotes"),
  ("prompt: 'open\n", "run.yml:2  not YAML", "quotes"),
  ("prompt: a: b\n", "run.yml:1  not YAML", "put quotes around a value that contains ': '"),
  ("steps: 3\n---\nsteps: 4\n", "run.yml:2  not YAML", "keep one document"),
  ("steps: @3\n", "run.yml:1  not YAML"),
  ("steps: *nowhere\n", "run.yml:1  not YAML: found undefined alias"),
  (
    "steps: !!python/object:os.system 3\n",
    "run.yml:1  the tag '!!python/object:os.system'",
    "leave it away",
  ),
  ("steps: !number 3\n", "run.yml:1  the tag '!number' means nothing here; leave it away"),
  (
    "adamw_mask: &a [x]\nmlp_activations: *a\n",
    "run.yml:2  a list or mapping is repeated by an alias",
    "write it out",
  ),
  ("adamw_mask: &a [*a]\n", "run.yml:1  a list or mapping is repeated by an alias"),
  ("? [a]\n: 3\n", "run.yml:1  a list or mapping cannot be a key"),
  ("<<: {steps: 3}\n", "run.yml:1  <<: no such key"),
  ("[" * 3000, "run.yml  not a configuration", "nested too deeply"),
  (b"\x89PNG\r\n\x1a\n\xff", "run.yml  is not UTF-8 text", "a configuration is a YAML text file"),
  (b"steps: \x00\x01", "run.yml  not YAML: special characters are not allowed", "plain text"),
  (b"# " + b"x" * (1 << 20), "run.yml  is larger than 1 MB"),
  (
    "base_config: run.yml\n",
    "run.yml:1  base_config: run.yml -> run.yml is a circle; remove one base_config",
  ),
  ("base_config: absent.yml\n", "run.yml:1  base_config: 'absent.yml': no such file"),
  ("base_config: [a.yml]\n", "run.yml:1  base_config: is a list; name one file"),
  (
    "model_name: tinny\n",
    "run.yml:1  model_name: 'tinny' is no model preset, did you mean 'tiny'?",
  ),
  (
    "model_name: tiny\nbase_num_kv_heads: 3\n",
    "run.yml:2  base_num_kv_heads: 4 query heads cannot share 3 kv heads",
    "(base_num_query_heads=4, configs/models/tiny.yml:3)",
  ),
  (
    "model_name: tiny\nhardware: cpu\ndevices: 4\nici_tensor_parallelism: 4\n",
    "run.yml:4  ici_tensor_parallelism: 2 kv heads cannot be split over tensor 4",
    "(base_num_kv_heads=2, configs/models/tiny.yml:4)",
  ),
]

# The text of own.yml, a decoder block, and what the one line of complaint must contain.
WORKING_BLOCK = """width: 64
blocks:
  layer:
    attention: {heads: 4, kv_heads: 2, head_dim: 16}
    mlp: {hidden: 128}
"""
BLOCKS = [
  (
    WORKING_BLOCK.replace("heads: 4", "haeds: 4"),
    "own.yml:4  blocks.layer.attention.haeds: no such part",
    "did you mean 'heads'?",
  ),
  (
    WORKING_BLOCK.replace("heads: 4, ", ""),
    "blocks.layer.attention.heads: is missing; write a whole number",
  ),
  (
    WORKING_BLOCK.replace("head_dim: 16", "head_dim: wide"),
    "own.yml:4  blocks.layer.attention.head_dim: 'wide' is not",
  ),
  (
    WORKING_BLOCK.replace("head_dim: 16", "head_dim: '${haed_dim}'"),
    "no such architecture key, did you mean 'head_dim'?",
  ),
  (
    WORKING_BLOCK.replace("64", "8${base_emb_dim}"),
    "own.yml:1  8${base_emb_dim}: must stand alone; write only",
  ),
  (
    WORKING_BLOCK.replace("kv_heads: 2", "kv_heads: 3"),
    "own.yml:4  blocks.layer.attention.kv_heads: 3 does not divide 4",
  ),
  (WORKING_BLOCK + "pattern: [layer, other]\n", "own.yml:6  pattern: 'other': no such block"),
  (
    WORKING_BLOCK + "  more: {like: laier}\npattern: [layer]\n",
    "blocks.more.like: 'laier': no earlier block, did you",
  ),
  (
    WORKING_BLOCK + "  more: {like: layer}\n",
    "own.yml  pattern: is missing; write the blocks' names in order",
  ),
  (WORKING_BLOCK + "depth: 3\n", "own.yml:6  depth: no such part"),
  (
    WORKING_BLOCK.replace("head_dim: 16", "head_dim: 16, rope: {scaling: {factor: 8}}"),
    "own.yml:4  blocks.layer.attention.rope.scaling.kind: is missing; write one of wavelength,",
  ),
  (
    WORKING_BLOCK.replace("head_dim: 16", "head_dim: 16, rope: {scaling: {kind: yran}}"),
    "rope.scaling.kind: 'yran': no such kind, did you mean 'yarn'?",
  ),
  (
    WORKING_BLOCK.replace("head_dim: 16", "head_dim: 16, rope: {scaling: {kind: yarn, low: 1}}"),
    "rope.scaling.low: no such part",
  ),
  (
    WORKING_BLOCK.replace("head_dim: 16", "head_dim: 16, rope: {scaling: 8}"),
    "rope.scaling: is text; write a mapping of its parts",
  ),
  (
    WORKING_BLOCK.replace(
      "head_dim: 16", "head_dim: 16, rope: {scaling: {case: yarn, yran: null, default: null}}"
    ),
    "rope.scaling: 'yarn': no such case, did you mean 'yran'?",
  ),
  (
    WORKING_BLOCK.replace("head_dim: 16", "head_dim: 16, rope: {scaling: {case: '${rope_typ}'}}"),
    "own.yml:4  ${rope_typ}: no such architecture key, did you mean 'rope_type'?",
  ),
  (
    WORKING_BLOCK.replace("head_dim: 16", "head_dim: 16, rope: {sections: {sizes: [2, 2, 2]}}"),
    "own.yml:4  blocks.layer.attention.rope.sections: [2, 2, 2] are 6 pairs, but 16 channels turn;",
  ),
  ("width: 64\n", "blocks: is missing; name each block"),
  ("width: 64\nblocks: 3\n", "blocks: is missing; name each block"),
  ("width: 64\nblocks: {layer: 3}\n", "own.yml:2  blocks.layer: is text; write a mapping"),
  ("width: [\n", "own.yml:2  not YAML"),
]

ENVIRONMENTS = [
  ({"M_STEPS": "ten"}, "", "environment  M_STEPS: 'ten' is not a whole number"),
  ({"M_STEPZ": "3"}, "", "environment  M_STEPZ: no such key, did you mean 'M_STEPS'?; unset it"),
  ({"M_steps": "3"}, "", "environment  M_steps: no such key, did you mean 'M_STEPS'?"),
  ({"M_BASE_CONFIG": "a.yml"}, "", "environment  M_BASE_CONFIG: belongs in a file"),
  (
    {"M_STEPS": "3"},
    "steps=4",
    "command line  steps: '4' here, but M_STEPS=3 in the environment; remove one",
  ),
  (
    {"M_PACKING": ""},
    "",
    "environment  M_PACKING: has no value; write true or false",
  ),
  ({"M_RUN_NAME": "\udcff"}, "", "environment  M_RUN_NAME: '\\udcff' is not valid UTF-8"),
  (
    {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    "hardware=cpu ici_tensor_parallelism=3",
    "4 devices cannot be arranged as tensor 3",
  ),
  (
    {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    "hardware=cpu devices=8",
    "devices: 8 virtual devices, but XLA_FLAGS in the environment asks for 4; remove one",
  ),
  (
    {"XLA_FLAGS": "--xla_force_host_platform_device_count=many"},
    "steps=1",
    "XLA_FLAGS: --xla_force_host_platform_device_count=many is not a number of devices; write",
  ),
  (
    {"XLA_FLAGS": "--xla_force_host_platform_device_count=0"},
    "steps=1",
    "XLA_FLAGS: --xla_force_host_platform_device_count=0 is not a number of devices; write",
  ),
]


def one_line(lines: list[str], words: tuple[str, ...]) -> None:
  assert len(lines) == 1, "\n".join(lines)
  assert len(lines[0]) <= 300 and lines[0].isprintable()
  assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("typed, words", [(row[0], row[1:]) for row in COMMAND_LINES])
def test_a_wrong_command_line_is_refused_in_a_line(refused, folder, typed, words):
  (folder / "base.yml").write_text("")
  (folder / "configs").mkdir()
  one_line(refused(*typed.split(" ")), words)


@pytest.mark.parametrize("text, words", [(row[0], row[1:]) for row in FILES])
def test_a_wrong_file_is_refused_in_a_line(refused, text, words):
  one_line(refused("run.yml", files={"run.yml": text}), words)


@pytest.mark.parametrize("text, words", [(row[0], row[1:]) for row in BLOCKS])
def test_a_wrong_decoder_block_is_refused_in_a_line(refused, text, words):
  one_line(refused("decoder_block=own.yml", files={"own.yml": text}), words)


@pytest.mark.parametrize(
  "environ, typed, words", [(row[0], row[1], row[2:]) for row in ENVIRONMENTS]
)
def test_a_wrong_environment_is_refused_in_a_line(refused, environ, typed, words):
  one_line(refused(*typed.split(), environ=environ), words)


@pytest.mark.parametrize("typed, words", [(row[0], row[1:]) for row in LINKS])
def test_a_place_that_cannot_be_reached_is_refused_in_a_line(
  refused, folder, monkeypatch, typed, words
):
  (folder / "base.yml").write_text("")
  (folder / "loop").symlink_to("loop")
  (folder / "run.yml").symlink_to("run.yml")
  (folder / "dangling").symlink_to("nowhere")
  (folder / "locked").mkdir()
  may = os.access  # root may all
  monkeypatch.setattr(
    os, "access", lambda path, mode: "locked" not in str(path) and may(path, mode)
  )
  one_line(refused(typed), words)


def test_a_run_may_have_a_folder_of_its_own_in_one_that_cannot_be_written(
  loaded, folder, monkeypatch
):
  (folder / "locked" / "mine").mkdir(parents=True)
  monkeypatch.setattr(os, "access", lambda path, mode: path.name != "locked")
  assert loaded("base_output_directory=locked", "run_name=mine").run.run_name == "mine"


def test_a_run_in_a_folder_that_cannot_be_written_may_be_read(loaded, folder, monkeypatch):
  (folder / "locked" / "mine").mkdir(parents=True)
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  typed = ("base_output_directory=locked", "run_name=mine", "metrics_file=locked/x")
  assert loaded(*typed, "load_parameters_path=gone", purpose="read").run.run_name == "mine"
  with pytest.raises(ConfigError, match="dataset_path: 'gone': no such file"):
    loaded(*typed, "dataset_path=gone", purpose="read")


def test_a_chain_of_files_without_end_is_refused_in_a_line(refused):
  files = {f"{i}.yml": f"base_config: {i + 1}.yml\n" for i in range(60)}
  files["60.yml"] = "steps: 3\n"
  one_line(refused("0.yml", files=files), ("base_config: ", "more than 50 files; merge some"))


def test_all_complaints_come_at_once_in_the_order_of_their_places(refused):
  run = "steps: ten\nlearning_rat: 1\nbase_config: low.yml\n"
  lines = refused(
    "run.yml",
    "attention=paged",
    "--debug=true",
    files={"run.yml": run, "low.yml": "packing: 7\n"},
    environ={"M_DTYPE": "int8"},
  )
  places = ["low.yml:1", "run.yml:1", "run.yml:2", "environment", "command line", "command line"]
  assert [line[:14].rstrip() for line in lines] == places
  keys = ["packing:", "steps:", "learning_rat:", "M_DTYPE:", "--debug=true:", "attention:"]
  assert [line[14:].split()[0] for line in lines] == keys


def test_a_wrong_value_is_not_complained_of_twice(refused):
  """The heads are unreadable: what depends on them says nothing."""
  lines = refused("base_num_query_heads=x", "base_num_kv_heads=3", "hardware=cpu", "devices=8")
  assert len(lines) == 1 and "base_num_query_heads: 'x' is not a whole number" in lines[0]


@pytest.mark.parametrize(
  "lost", ["absent.yml", "model_name=absent", "decoder_block=absent", "decoder_block=bad.yml"]
)
def test_a_file_that_is_lost_causes_no_other_complaints(refused, lost):
  """What it would have said of heads, activations and the rest is not known."""
  argv = [lost, "base_num_query_heads=6", "trainable_position_size=9", "mlp_activations=[relu]"]
  (line,) = refused(*argv, "max_target_length=4096", "base_emb_dim=99", files={"bad.yml": "[\n"})
  assert "absent" in line or line.startswith("bad.yml:2")


def test_a_wrong_value_is_refused_even_where_another_place_overrides_it(refused):
  assert "run.yml:1" in refused("run.yml", "steps=3", files={"run.yml": "steps: ten\n"})[0]


def test_a_complaint_names_the_places_of_both_values_that_collide(refused):
  files = {"run.yml": "base_num_query_heads: 8\nbase_num_kv_heads: 8\n"}
  (line,) = refused("run.yml", "base_num_kv_heads=5", files=files)
  assert line.startswith("command line  base_num_kv_heads: ")
  assert line.endswith("(base_num_query_heads=8, run.yml:1)")


def test_long_and_unprintable_input_stays_within_a_line(refused):
  long = "x" * 10_000
  for argv in (
    [f"{long}=1"],
    [f"steps={long}"],
    [f"attention={long}"],
    [long],
    [f"--{long}"],
    [f"model_name={long}"],
    [f"dataset_path={long}"],
    [f"decoder_block={long}/x.yml"],
    [f"logical_axis_rules={{{long}: [fsdp]}}"],
    ["steps=\n\x1b[31m"],
    ["a\nb=3"],
    ["a\nb"],
    ["dataset_path=a\nb"],
    ["tokenizer_type=bpe", "tokenizer_path=a\x1b"],
    ["base_output_directory=/dev/null/\n"],
    [f"resume_changes=[{long}]"],
    [f"run_name={long}"],
  ):
    for line in refused(*argv):
      assert len(line) <= 300 and line.isprintable(), line


def test_a_complaint_comes_without_jax_and_at_once(folder: Path):
  """A process of its own: in this one, jax may have been imported by other tests."""
  program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from maxtext.config import load
from maxtext.errors import ConfigErrors
try:
  load(["steps=ten"], {{}})
except ConfigErrors:
  heavy = {{"jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy"}} & set(sys.modules)
  print(sorted(heavy), time.process_time())
"""
  run = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=True
  )
  heavy, seconds = run.stdout.rsplit(" ", 1)
  assert heavy == "[]"
  assert float(seconds) < 0.5  # of processor time since the start of the process


HF, SPM, RANKS = (
  f"tokenizer_type={kind} tokenizer_path=" for kind in ("huggingface", "sentencepiece", "tiktoken")
)
# What is typed where there are tokenizers, good and bad, and what the one line must contain; those
# of the second table have to be opened to be seen through, which training does before all else.
TOKENIZERS = [
  (HF + "absent", "tokenizer_path: 'absent': no such file; name a tokenizer.json, or a folder"),
  (HF + "empty", "tokenizer_path: 'empty': holds no tokenizer.json; name a tokenizer.json, or"),
  (SPM + "absent.model", "tokenizer_path: 'absent.model': no such file; name a .model file"),
  (SPM + "good", "tokenizer_path: 'good': is a folder; name a .model file"),
  (RANKS + "absent", "tokenizer_path: 'absent': no such file; name a .tiktoken file"),
  (RANKS + "good", "tokenizer_path: 'good': is a folder; name a .tiktoken file"),
  ("tokenizer_type=bpe tokenizer_path=empty", "tokenizer_path: 'empty': holds no tokenizer.json"),
  ("tokenizer_type=huggingface", "tokenizer_type: huggingface reads a file; set tokenizer_path="),
  ("tokenizer_type=sentencepiece", "reads a file; set tokenizer_path=a .model file"),
  ("tokenizer_type=tiktoken", "reads a file; set tokenizer_path=a .tiktoken file"),
  ("tokenizer_type=hugingface", "'hugingface' is not known, did you mean 'huggingface'?"),
  ("tokenizer_path=a.model", "tokenizer_path: the byte tokenizer", "tokenizer_type=sentencepiece"),
  ("tokenizer_path=a.tiktoken", "tokenizer_path: the byte tokenizer", "tokenizer_type=tiktoken"),
  (HF + "good tokenizer_vocab_size=500", "has an effect only with tokenizer_type=bpe"),
  ("use_chat_template=true", "use_chat_template: has an effect only with tokenizer_type=hugging"),
  (SPM + "spiece.model use_chat_template=true", "use_chat_template: has an effect only with"),
]
OPENED = [
  (
    HF + "cut.json",
    3,
    "tokenizer_path: cut.json: is cut short, or no file of the tokenizers",
    "copy",
  ),
  (HF + "spiece.model", 3, "tokenizer_path: spiece.model: is cut short, or no file of the tok"),
  (HF + "blank", 3, "tokenizer_path: blank: is empty; copy it again"),
  (HF + "pointer", 3, "tokenizer_path: pointer: is a Git LFS pointer", "run `git lfs pull`"),
  (SPM + "cut.model", 3, "tokenizer_path: cut.model: is cut short, or no SentencePiece model"),
  (SPM + "ranks.tiktoken", 3, "tokenizer_path: ranks.tiktoken: is cut short, or no Sentence"),
  (RANKS + "cut.tiktoken", 3, "tokenizer_path: cut.tiktoken:", "; copy the file again"),
  (RANKS + "spiece.model", 3, "tokenizer_path: spiece.model:2: is no line of a token in base64"),
  ("tokenizer_type=bpe tokenizer_path=cut.json", 3, "tokenizer_path: cut.json: is cut short"),
  (
    HF + "good vocab_size=100",
    2,
    "vocab_size: 100 rows are fewer than the tokenizer's 379 tokens; use at least 379, or null",
  ),
  (SPM + "spiece.model vocab_size=319", 2, "319 rows are fewer than the tokenizer's 320 tokens"),
  (
    RANKS + "ranks.tiktoken vocab_size=600 add_bos=false",
    2,
    "vocab_size: 600 rows are fewer than the tokenizer's 601 tokens; use at least 601",
  ),
  (RANKS + "ranks.tiktoken", 2, "ranks.tiktoken has no bos token; set add_bos=false"),
  (
    HF + "bare",
    2,
    "bare has no bos token; set add_bos=false, or name its bos_token in tokenizer_c",
  ),
]


@pytest.fixture
def tokenizers(folder: Path) -> Path:
  vocabularies.huggingface(folder / "good")
  bare = vocabularies.huggingface(folder / "bare", tokenizer_config={"bos_token": None})
  ranks = vocabularies.tiktoken_file(folder, vocabularies.ranks(600))
  model = vocabularies.sentencepiece_model(folder)
  for whole, cut in ((bare / "tokenizer.json", "json"), (ranks, "tiktoken"), (model, "model")):
    content = whole.read_bytes()
    (folder / f"cut.{cut}").write_bytes(content[: len(content) // 2 - 1])
  (folder / "empty").mkdir()
  (folder / "blank").touch()
  (folder / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
  return folder


@pytest.mark.parametrize("typed, words", [(row[0], row[1:]) for row in TOKENIZERS])
def test_a_tokenizer_that_is_not_there_is_refused_in_a_line(tokenizers, refused, typed, words):
  one_line(refused(*typed.split(" ")), words)


@pytest.mark.parametrize("typed, code, words", [(row[0], row[1], row[2:]) for row in OPENED])
def test_a_tokenizer_that_does_not_do_is_refused_in_a_line_before_any_device(
  tokenizers, loaded, typed, code, words, monkeypatch
):
  monkeypatch.setattr(program, "find_devices", lambda run: pytest.fail("a device was asked for"))
  with pytest.raises(UserError) as caught:
    trainer.train(loaded(*typed.split(" ")))
  assert caught.value.exit_code == code
  one_line(str(caught.value).split("\n"), ("command line  ", *words))


def test_a_model_that_no_memory_holds_is_refused_before_anything_is_compiled(loaded, monkeypatch):
  monkeypatch.setattr(trainer.Run, "train", lambda *_: pytest.fail("the run began"))
  run = loaded(
    "vocab_size=2000000000", "run_name=huge", "jax_cache_dir=", "per_device_batch_size=1"
  )
  with pytest.raises(ConfigError) as caught:
    trainer.train(run)
  words = ("vocab_size: parameters and optimizer take ", " GiB on each of 8 devices, which have ")
  one_line(str(caught.value).split("\n"), words)


@pytest.mark.parametrize("kind, package", [(SPM, "sentencepiece"), (RANKS, "tiktoken")])
def test_a_missing_package_is_refused_in_a_line(tokenizers, refused, monkeypatch, kind, package):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  (line,) = refused(*f"{kind}spiece.model".split(" "))
  assert f"needs the package {package}, which is not installed; pip install 'maxtext[hf]'" in line


def test_loading_a_configuration_imports_no_tokenizer(tokenizers):
  code = (
    "import sys; from maxtext import config\n"
    f"for words in {[HF + 'good', SPM + 'spiece.model', RANKS + 'ranks.tiktoken']!r}:\n"
    "  config.load(words.split(' '))\n"
    "print(*{'tokenizers', 'sentencepiece', 'tiktoken', 'jinja2', 'numpy'} & set(sys.modules))"
  )
  environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
  assert (done.stdout, done.stderr) == ("\n", "")
