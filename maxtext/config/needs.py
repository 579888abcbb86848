"""Keys that have an effect only beside others: each is refused where it has none."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import get_args, get_type_hints

from maxtext.config.config import Config
from maxtext.config.sections import SECTION_OF
from maxtext.config.values import render
from maxtext.layers.sections import Memory

_FORM = re.compile(r"(?:an? |another )?(\w+)(=| than | above | of at least )([^,]+)")
_HOLDS: dict[str, Callable[[object, list[str]], bool]] = {
  "=": lambda value, wanted: render(value) in wanted,
  " than ": lambda value, wanted: render(value) not in wanted,
  " above ": lambda value, wanted: value > float(wanted[0]),  # type: ignore[operator]
  " of at least ": lambda value, wanted: value >= float(wanted[0]),  # type: ignore[operator]
}


@dataclasses.dataclass(frozen=True)
class Need:
  """Keys that have an effect only where `holds`: in `words`, the first key of which decides it."""

  keys: tuple[str, ...]
  words: str
  holds: Callable[[Config], bool]

  @property
  def decider(self) -> str:
    return next(word for word in re.findall(r"\w+", self.words) if word in SECTION_OF)


def _need(
  keys: str | Iterable[str], words: str, holds: Callable[[Config], bool] | None = None
) -> Need:
  """`keys` in one text, or one by one. Without `holds`, words say it: KEY=VALUE, KEY=THIS or THAT,
  another KEY than VALUE, KEY above NUMBER, KEY of at least NUMBER; a comma ends them.
  """
  if holds is None:
    form = _FORM.match(words)
    assert form, words
    key, sign, wanted = form[1], form[2], form[3].split(" or ")
    holds = lambda c: _HOLDS[sign](c.values[key], wanted)
  return Need(tuple(keys.split() if isinstance(keys, str) else keys), words, holds)


def _rope_type(config: Config) -> str | None:
  """None where the decoder block does not use it, which is complained of by itself."""
  return config.architecture.rope_type if "rope_type" in config.block.uses else None


def _splits_length(config: Config) -> bool:
  axes = config.mesh.logical_axis_rules.get("activation_length", ())
  return any(getattr(config.mesh, key) != 1 for axis in axes for key in config.mesh.keys(axis))


def _over(config: Config, axis: str) -> bool:
  """Whether the mesh is wider than 1 along `axis`, within a slice or over several."""
  over = config.mesh.num_slices > 1 and getattr(config.mesh, f"dcn_{axis}_parallelism") != 1
  return over or getattr(config.mesh, f"ici_{axis}_parallelism") != 1


_LAYERS = "layer_pattern=[], whose blocks are the layers as they stand there"
NEEDS = (
  _need("mtp_loss_scaling_factor", "mtp_num_layers above 0"),
  _need("adam_b1 adam_b2 adam_eps adam_weight_decay adamw_mask mu_dtype", "opt_type=adamw"),
  _need(
    "num_layers_per_pipeline_stage num_pipeline_repeats num_pipeline_microbatches"
    " pipeline_delay_activation_forwarding",
    "ici_pipeline_parallelism above 1",
    lambda c: (c.mesh.ici_pipeline_parallelism, c.mesh.dcn_pipeline_parallelism) != (1, 1),
  ),
  _need("wsd_decay_steps_fraction", "lr_schedule_type=wsd"),
  _need("learning_rate_final_fraction", "another lr_schedule_type than constant"),
  _need(
    "eval_steps eval_per_device_batch_size eval_sample_prompt eval_sample_length",
    "an eval_interval of at least 1",
  ),
  _need("record_internal_nn_metrics", "enable_tensorboard=true"),
  _need(
    "packing grain_packing_type max_segments_per_seq use_truncation add_eos"
    " enable_data_shuffling eval_fraction",
    "another dataset_type than synthetic",
  ),
  _need("grain_train_files grain_eval_files grain_train_mixture_config_path", "dataset_type=grain"),
  _need("hf_path hf_train_files", "dataset_type=hf"),
  _need("hf_eval_files", "hf_train_files", lambda c: bool(c.data.hf_train_files)),
  _need(
    "hf_name train_split eval_split",
    "dataset_type=hf and a saved dataset, hf_path",
    lambda c: c.data.dataset_type == "hf" and not c.data.hf_train_files,
  ),
  _need(
    "grain_file_type grain_worker_count train_data_columns eval_data_columns dataset_cache_dir"
    " data_errors",
    "dataset_type=grain or hf, which read documents as they are needed",
  ),
  _need(
    "eval_data_columns",
    "eval_split or grain_eval_files, since held-out documents have train_data_columns",
    lambda c: bool(c.data.evaluated),
  ),
  _need(
    "eval_fraction",
    "neither eval_split nor grain_eval_files, which say what is evaluated on",
    lambda c: not c.data.evaluated,
  ),
  _need(
    "text_column",
    "a dataset_path, since neither the embedded text nor random tokens have columns",
    lambda c: bool(c.data.dataset_path),
  ),
  _need("grain_packing_type max_segments_per_seq", "packing=true"),
  _need("tokenizer_vocab_size", "tokenizer_type=bpe"),
  _need(
    "tokenizer_vocab_size",
    "an empty tokenizer_path, since that file has its own size",
    lambda c: not c.data.tokenizer_path or c.data.tokenizer_type != "bpe",
  ),
  _need("use_chat_template", "tokenizer_type=huggingface, since no other kind has chat templates"),
  _need("decode_sampling_nucleus_p", "decode_sampling_strategy=nucleus"),
  _need("decode_sampling_top_k", "decode_sampling_strategy=topk"),
  _need("decode_sampling_temperature", "another decode_sampling_strategy than greedy"),
  _need("skip_step_interval skip_step_scaling_factor skip_step_limit", "skip_step_on_spikes=true"),
  _need("checkpoint_keep_period checkpoint_keep_best", "a max_num_checkpoints_to_keep above 0"),
  _need("checkpoint_keep_best", "an eval_interval of at least 1"),
  _need("watchdog_restart", "a watchdog_timeout_seconds above 0"),
  _need(
    "save_checkpoint_on_start checkpoint_period max_num_checkpoints_to_keep rollback_limit"
    " enable_emergency_checkpoint enable_continuous_checkpointing",
    "enable_checkpointing=true",
  ),
  _need("checkpoint_period", "enable_continuous_checkpointing=false"),
  _need("enable_continuous_checkpointing", "async_checkpointing=true"),
  _need("local_checkpoint_directory local_checkpoint_period", "enable_emergency_checkpoint=true"),
  _need("rope_use_scale", "rope_type=llama3.1", lambda c: _rope_type(c) in ("llama3.1", None)),
  _need(
    "original_max_position_embeddings",
    "another rope_type than default",
    lambda c: _rope_type(c) != "default",
  ),
  _need(
    "rope_factor",
    "rope_type=llama3.1, yarn or dynamic",
    lambda c: _rope_type(c) not in ("default", "longrope"),
  ),
  _need(
    "rope_factor original_max_position_embeddings",
    "rope_use_scale=true",
    lambda c: _rope_type(c) != "llama3.1" or c.architecture.rope_use_scale,
  ),
  _need(
    "beta_fast beta_slow rope_truncate rope_attention_scaling mscale",
    "rope_type=yarn",
    lambda c: _rope_type(c) in ("yarn", None),
  ),
  _need(
    "rope_short_factors rope_long_factors",
    "rope_type=longrope",
    lambda c: _rope_type(c) in ("longrope", None),
  ),
  _need(
    "rope_attention_factor",
    "rope_type=longrope, or rope_type=yarn and rope_attention_scaling=true",
    lambda c: (
      _rope_type(c) in ("longrope", None)
      or (_rope_type(c) == "yarn" and c.architecture.rope_attention_scaling)
    ),
  ),
  _need("nope_layer_interval first_num_dense_layers interleave_moe_layer_step", _LAYERS),
  _need("temperature_tuning_scale temperature_tuning_floor_scale", "temperature_tuning=true"),
  _need(
    "sparse_matmul megablox capacity_factor use_random_routing float32_gate_logits"
    " load_balance_loss_weight",
    "a decoder_block that has experts",
    lambda c: c.moes is None or len(c.moes) > 0,
  ),
  _need("shared_experts", "base_shared_mlp_dim=null, which says the width by itself"),
  _need(
    "n_routing_groups",
    "a topk_routing_group, the number of groups that are chosen from",
    lambda c: c.architecture.topk_routing_group > 0,
  ),
  _need(
    "routed_bias_update_rate",
    "routed_bias=true, in a decoder block that uses it",
    lambda c: c.moes is None or any(moe.choice_bias for moe in c.moes),
  ),
  _need("megablox", "sparse_matmul=true"),
  _need("capacity_factor", "sparse_matmul=false"),
  _need("float32_gate_logits", "use_random_routing=false"),
  _need(
    (key for key, section in SECTION_OF.items() if section == "kernel" and key[:3] == "sa_"),
    "attention=flash or autoselected",
  ),
  _need("sa_block_q_dq sa_block_kv_dq", "sa_use_fused_bwd_kernel=false"),
  _need("context_parallel_load_balance", "context_parallel_strategy=all_gather or ring"),
  _need(
    "context_parallel_strategy context_parallel_load_balance",
    "a parallelism over an axis to which logical_axis_rules give activation_length",
    _splits_length,
  ),
  _need(
    (key for key, hint in get_type_hints(Memory).items() if "offload" in get_args(hint)),
    "remat_policy=custom",
  ),
  _need(
    "shard_optimizer_over_data optimizer_memory_host_offload",
    "another opt_type than sgd, which keeps no state",
  ),
  _need(
    "shard_optimizer_over_data",
    "ici_data_parallelism (or that over slices) above 1",
    lambda c: _over(c, "data"),
  ),
)
