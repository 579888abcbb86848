"""Keys that have an effect only beside others: each is refused where it has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import get_args, get_type_hints

from maxtext.config.config import Config
from maxtext.config.sections import SECTION_OF
from maxtext.layers.sections import Memory


@dataclasses.dataclass(frozen=True)
class Need:
  """Keys that have an effect only where `holds`: in `words`, and decided by the key `decider`."""

  keys: tuple[str, ...]
  words: str
  decider: str
  holds: Callable[[Config], bool]


NEEDS = (
  Need(
    ("mtp_loss_scaling_factor",),
    "mtp_num_layers above 0",
    "mtp_num_layers",
    lambda c: c.architecture.mtp_num_layers > 0,
  ),
  Need(
    ("adam_b1", "adam_b2", "adam_eps", "adam_weight_decay", "adamw_mask", "mu_dtype"),
    "opt_type=adamw",
    "opt_type",
    lambda c: c.optimizer.opt_type == "adamw",
  ),
  Need(
    (
      "num_layers_per_pipeline_stage",
      "num_pipeline_repeats",
      "num_pipeline_microbatches",
      "pipeline_delay_activation_forwarding",
    ),
    "ici_pipeline_parallelism above 1",
    "ici_pipeline_parallelism",
    lambda c: (c.mesh.ici_pipeline_parallelism, c.mesh.dcn_pipeline_parallelism) != (1, 1),
  ),
  Need(
    ("wsd_decay_steps_fraction",),
    "lr_schedule_type=wsd",
    "lr_schedule_type",
    lambda c: c.optimizer.lr_schedule_type == "wsd",
  ),
  Need(
    ("learning_rate_final_fraction",),
    "another lr_schedule_type than constant",
    "lr_schedule_type",
    lambda c: c.optimizer.lr_schedule_type != "constant",
  ),
  Need(
    ("eval_steps", "eval_per_device_batch_size", "eval_sample_prompt", "eval_sample_length"),
    "an eval_interval of at least 1",
    "eval_interval",
    lambda c: c.eval.eval_interval > 0,
  ),
  Need(
    ("record_internal_nn_metrics",),
    "enable_tensorboard=true",
    "enable_tensorboard",
    lambda c: c.observe.enable_tensorboard,
  ),
  Need(
    (
      "packing",
      "grain_packing_type",
      "max_segments_per_seq",
      "add_eos",
      "enable_data_shuffling",
      "eval_fraction",
    ),
    "another dataset_type than synthetic",
    "dataset_type",
    lambda c: c.data.dataset_type != "synthetic",
  ),
  Need(
    ("grain_train_files", "grain_eval_files", "grain_train_mixture_config_path"),
    "dataset_type=grain",
    "dataset_type",
    lambda c: c.data.dataset_type == "grain",
  ),
  Need(
    ("hf_path", "train_split", "eval_split"),
    "dataset_type=hf",
    "dataset_type",
    lambda c: c.data.dataset_type == "hf",
  ),
  Need(
    (
      "grain_file_type",
      "grain_worker_count",
      "train_data_columns",
      "eval_data_columns",
      "dataset_cache_dir",
      "data_errors",
    ),
    "dataset_type=grain or hf, which read documents as they are needed",
    "dataset_type",
    lambda c: c.data.dataset_type in ("grain", "hf"),
  ),
  Need(
    ("eval_data_columns",),
    "grain_eval_files or eval_split, since held-out documents have train_data_columns",
    "eval_split",
    lambda c: bool(c.data.grain_eval_files or c.data.eval_split),
  ),
  Need(
    ("eval_fraction",),
    "neither grain_eval_files nor eval_split, which say what is evaluated on",
    "eval_split",
    lambda c: not (c.data.grain_eval_files or c.data.eval_split),
  ),
  Need(
    ("text_column",),
    "a dataset_path, since neither the embedded text nor random tokens have columns",
    "dataset_path",
    lambda c: bool(c.data.dataset_path),
  ),
  Need(
    ("grain_packing_type", "max_segments_per_seq"),
    "packing=true",
    "packing",
    lambda c: c.data.packing,
  ),
  Need(
    ("tokenizer_vocab_size",),
    "tokenizer_type=bpe",
    "tokenizer_type",
    lambda c: c.data.tokenizer_type == "bpe",
  ),
  Need(
    ("tokenizer_vocab_size",),
    "an empty tokenizer_path, since that file has its own size",
    "tokenizer_path",
    lambda c: not c.data.tokenizer_path or c.data.tokenizer_type != "bpe",
  ),
  Need(
    ("use_chat_template",),
    "tokenizer_type=huggingface, since no other kind has chat templates",
    "tokenizer_type",
    lambda c: c.data.tokenizer_type == "huggingface",
  ),
  Need(
    ("decode_sampling_nucleus_p",),
    "decode_sampling_strategy=nucleus",
    "decode_sampling_strategy",
    lambda c: c.decode.decode_sampling_strategy == "nucleus",
  ),
  Need(
    ("decode_sampling_top_k",),
    "decode_sampling_strategy=topk",
    "decode_sampling_strategy",
    lambda c: c.decode.decode_sampling_strategy == "topk",
  ),
  Need(
    ("decode_sampling_temperature",),
    "another decode_sampling_strategy than greedy",
    "decode_sampling_strategy",
    lambda c: c.decode.decode_sampling_strategy != "greedy",
  ),
  Need(
    ("skip_step_interval", "skip_step_scaling_factor", "skip_step_limit"),
    "skip_step_on_spikes=true",
    "skip_step_on_spikes",
    lambda c: c.training.skip_step_on_spikes,
  ),
  Need(
    ("local_checkpoint_directory", "local_checkpoint_period"),
    "enable_emergency_checkpoint=true",
    "enable_emergency_checkpoint",
    lambda c: c.checkpoint.enable_emergency_checkpoint,
  ),
  Need(
    ("checkpoint_keep_period", "checkpoint_keep_best"),
    "a max_num_checkpoints_to_keep above 0",
    "max_num_checkpoints_to_keep",
    lambda c: c.checkpoint.max_num_checkpoints_to_keep > 0,
  ),
  Need(
    ("checkpoint_keep_best",),
    "an eval_interval of at least 1",
    "eval_interval",
    lambda c: c.eval.eval_interval > 0,
  ),
  Need(
    ("watchdog_restart",),
    "a watchdog_timeout_seconds above 0",
    "watchdog_timeout_seconds",
    lambda c: c.observe.watchdog_timeout_seconds > 0,
  ),
  Need(
    (
      "save_checkpoint_on_start",
      "checkpoint_period",
      "max_num_checkpoints_to_keep",
      "enable_emergency_checkpoint",
      "rollback_limit",
    ),
    "enable_checkpointing=true",
    "enable_checkpointing",
    lambda c: c.checkpoint.enable_checkpointing,
  ),
  Need(
    ("rope_use_scale",),
    "rope_type=llama3.1",
    "rope_type",
    lambda c: _rope_type(c) in ("llama3.1", None),
  ),
  Need(
    ("original_max_position_embeddings",),
    "another rope_type than default",
    "rope_type",
    lambda c: _rope_type(c) != "default",
  ),
  Need(
    ("rope_factor",),
    "rope_type=llama3.1, yarn or dynamic",
    "rope_type",
    lambda c: _rope_type(c) not in ("default", "longrope"),
  ),
  Need(
    ("rope_factor", "original_max_position_embeddings"),
    "rope_use_scale=true",
    "rope_use_scale",
    lambda c: _rope_type(c) != "llama3.1" or c.architecture.rope_use_scale,
  ),
  Need(
    ("beta_fast", "beta_slow", "rope_truncate", "rope_attention_scaling", "mscale"),
    "rope_type=yarn",
    "rope_type",
    lambda c: _rope_type(c) in ("yarn", None),
  ),
  Need(
    ("rope_short_factors", "rope_long_factors"),
    "rope_type=longrope",
    "rope_type",
    lambda c: _rope_type(c) in ("longrope", None),
  ),
  Need(
    ("rope_attention_factor",),
    "rope_type=longrope, or rope_type=yarn and rope_attention_scaling=true",
    "rope_type",
    lambda c: (
      _rope_type(c) in ("longrope", None)
      or (_rope_type(c) == "yarn" and c.architecture.rope_attention_scaling)
    ),
  ),
  Need(
    ("nope_layer_interval",),
    "layer_pattern=[], whose blocks are the layers as they stand there",
    "layer_pattern",
    lambda c: not c.architecture.layer_pattern,
  ),
  Need(
    ("temperature_tuning_scale", "temperature_tuning_floor_scale"),
    "temperature_tuning=true",
    "temperature_tuning",
    lambda c: c.architecture.temperature_tuning,
  ),
  Need(
    ("first_num_dense_layers", "interleave_moe_layer_step"),
    "layer_pattern=[], whose blocks are the layers as they stand there",
    "layer_pattern",
    lambda c: not c.architecture.layer_pattern,
  ),
  Need(
    (
      "sparse_matmul",
      "megablox",
      "capacity_factor",
      "use_random_routing",
      "float32_gate_logits",
      "load_balance_loss_weight",
    ),
    "a decoder block that has experts",
    "decoder_block",
    lambda c: c.moes is None or len(c.moes) > 0,
  ),
  Need(
    ("shared_experts",),
    "base_shared_mlp_dim=null, which says the width by itself",
    "base_shared_mlp_dim",
    lambda c: c.architecture.base_shared_mlp_dim is None,
  ),
  Need(
    ("n_routing_groups",),
    "a topk_routing_group, the number of groups that are chosen from",
    "topk_routing_group",
    lambda c: c.architecture.topk_routing_group > 0,
  ),
  Need(
    ("routed_bias_update_rate",),
    "routed_bias=true, in a decoder block that uses it",
    "routed_bias",
    lambda c: c.moes is None or any(moe.choice_bias for moe in c.moes),
  ),
  Need(
    ("megablox",),
    "sparse_matmul=true",
    "sparse_matmul",
    lambda c: c.experts.sparse_matmul,
  ),
  Need(
    ("capacity_factor",),
    "sparse_matmul=false",
    "sparse_matmul",
    lambda c: not c.experts.sparse_matmul,
  ),
  Need(
    ("float32_gate_logits",),
    "use_random_routing=false",
    "use_random_routing",
    lambda c: not c.experts.use_random_routing,
  ),
  Need(
    tuple(key for key, section in SECTION_OF.items() if section == "kernel" and key[:3] == "sa_"),
    "attention=flash or autoselected",
    "attention",
    lambda c: c.kernel.attention in ("flash", "autoselected"),
  ),
  Need(
    ("context_parallel_load_balance",),
    "context_parallel_strategy=all_gather or ring",
    "context_parallel_strategy",
    lambda c: c.kernel.context_parallel_strategy != "ulysses",
  ),
  Need(
    ("context_parallel_strategy", "context_parallel_load_balance"),
    "a parallelism over an axis that splits activation_length",
    "logical_axis_rules",
    lambda c: any(
      getattr(c.mesh, key) != 1
      for axis in c.mesh.logical_axis_rules.get("activation_length", ())
      for key in c.mesh.keys(axis)
    ),
  ),
  Need(
    tuple(key for key, hint in get_type_hints(Memory).items() if "offload" in get_args(hint)),
    "remat_policy=custom",
    "remat_policy",
    lambda c: c.memory.remat_policy == "custom",
  ),
  Need(
    ("shard_optimizer_over_data", "optimizer_memory_host_offload"),
    "another opt_type than sgd, which keeps no state",
    "opt_type",
    lambda c: c.optimizer.opt_type != "sgd",
  ),
  Need(
    ("shard_optimizer_over_data",),
    "a parallelism over data",
    "ici_data_parallelism",
    lambda c: (
      c.mesh.ici_data_parallelism != 1
      or (c.mesh.num_slices > 1 and c.mesh.dcn_data_parallelism != 1)
    ),
  ),
  Need(
    ("sa_block_q_dq", "sa_block_kv_dq"),
    "sa_use_fused_bwd_kernel=false",
    "sa_use_fused_bwd_kernel",
    lambda c: not c.kernel.sa_use_fused_bwd_kernel,
  ),
)


def _rope_type(config: Config) -> str | None:
  """None where the decoder block does not use it, which is complained of by itself."""
  return config.architecture.rope_type if "rope_type" in config.block.uses else None
