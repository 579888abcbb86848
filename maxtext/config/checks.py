"""What sections and files demand of each other, whatever the devices are.

Each check yields (key, problem, *other keys). The complaint is made at the key that was set with
most precedence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from maxtext.bounds import LARGEST
from maxtext.config.complaints import Complaint
from maxtext.config.config import Config
from maxtext.config.sections import SECTION_OF
from maxtext.config.sources import ENVIRONMENT, PRESET
from maxtext.config.values import brief, shown
from maxtext.errors import closest

Problem = tuple[str, ...]
Purpose = Literal["train", "decode"]


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
    "dataset_type=text",
    "dataset_type",
    lambda c: c.data.dataset_type == "text",
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
    ("save_checkpoint_on_start", "checkpoint_period", "max_num_checkpoints_to_keep"),
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
    ("sa_block_q_dq", "sa_block_kv_dq"),
    "sa_use_fused_bwd_kernel=false",
    "sa_use_fused_bwd_kernel",
    lambda c: not c.kernel.sa_use_fused_bwd_kernel,
  ),
)


def of_run(config: Config, purpose: Purpose, environ: Mapping[str, str]) -> Iterator[Problem]:
  """What is wrong whatever the devices are."""
  yield from _presets(config)
  yield from _unused(config)
  yield from _model(config)
  yield from _names(config)
  yield from _prompts(config)
  yield from _virtual_devices(config, environ)
  if purpose == "train":
    yield from _batch_size(config)
    yield from _tiles(config)
    yield from _held_out(config)


def _presets(config: Config) -> Iterator[Problem]:
  for key, settings in config.history.items():
    for folder, section in (("models", "architecture"), ("sharding", "mesh")):
      if section != SECTION_OF[key] and any(
        s.level == PRESET and s.folder is not None and s.folder.name == folder for s in settings
      ):
        yield key, f"a preset of configs/{folder} holds keys of {section} only; set this elsewhere"


def _unused(config: Config) -> Iterator[Problem]:
  """Keys that were set, and that nothing reads in this run."""
  for key, section in SECTION_OF.items():
    if section == "architecture" and key not in config.block.uses and config.differs(key):
      yield (
        key,
        f"decoder block {shown(config.block.name)} does not use it; leave it away",
        "decoder_block",
      )
  for need in NEEDS:
    if not need.holds(config):
      for key in filter(config.differs, need.keys):
        if not _rests(config, key, need.decider):
          problem = f"has an effect only with {need.words}; set that, or leave {key} away"
          yield key, problem, need.decider


def _rope_type(config: Config) -> str | None:
  """None where the decoder block does not use it, which is complained of by itself."""
  return config.architecture.rope_type if "rope_type" in config.block.uses else None


def _rests(config: Config, key: str, decider: str) -> bool:
  """Whether `decider` was set beside `key` in its file, or above it: then `key` may wait there."""
  level, above = config.sources[key].level, config.sources[decider].level
  return above > level or above == level < ENVIRONMENT


def _model(config: Config) -> Iterator[Problem]:
  sizes, length = config.architecture, config.training.max_target_length
  uses = config.block.uses
  if "trainable_position_size" in uses and length > sizes.trainable_position_size:
    yield (
      "max_target_length",
      f"{length} tokens are longer than the learned positions; "
      f"use at most {sizes.trainable_position_size}, or raise trainable_position_size",
      "trainable_position_size",
    )
  head, heads = sizes.sizes()["head_dim"], sizes.base_num_query_heads
  if "base_num_kv_heads" in uses and heads % sizes.base_num_kv_heads:
    yield (
      "base_num_kv_heads",
      f"{heads} query heads cannot share {sizes.base_num_kv_heads} kv heads evenly; "
      f"base_num_kv_heads must be one of {_divisors(heads)}",
      "base_num_query_heads",
    )
  if "head_dim" not in uses:
    return
  if sizes.head_dim is None and sizes.base_emb_dim % heads:
    yield (
      "base_emb_dim",
      f"width {sizes.base_emb_dim} is not a multiple of {heads} heads; "
      "change one of them, or set head_dim",
      "base_num_query_heads",
    )
  if "rope_max_timescale" in uses and head % 2:
    others = ("head_dim",) if sizes.head_dim else ("base_emb_dim", "base_num_query_heads")
    yield (
      others[0],
      f"a head dimension of {head} is odd, and rotary positions turn pairs; make it even",
      *others[1:],
    )


def _divisors(n: int) -> str:
  """`1, 2, 4, 8`, the last ten at most."""
  found = [d for d in range(1, min(n, 4096) + 1) if n % d == 0]
  return ", ".join(map(str, found[-10:]))


def _names(config: Config) -> Iterator[Problem]:
  for key in config.run.resume_changes:
    if key not in SECTION_OF:
      yield (
        "resume_changes",
        f"{shown(key)} is no key{closest(key, SECTION_OF) or '; name keys, as [steps]'}",
      )


def _prompts(config: Config) -> Iterator[Problem]:
  sources, decode = config.sources, config.decode
  if (
    decode.prompt
    and decode.prompts_file
    and sources["prompt"].level == sources["prompts_file"].level
  ):
    problem = "give one prompt, or a prompts_file with one a line, not both"
    yield "prompt", problem, "prompts_file"


def _virtual_devices(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
  forced = config.run.forced_devices(environ)
  if config.run.devices is not None and forced not in (None, config.run.devices):
    yield (
      "devices",
      f"{config.run.devices} virtual devices, but XLA_FLAGS in the environment asks for {forced}; "
      "remove one",
    )


def _batch_size(config: Config) -> Iterator[Problem]:
  training = config.training
  tokens = training.per_device_batch_size * training.max_target_length
  if tokens > LARGEST:
    yield (
      "per_device_batch_size",
      f"{tokens:.3g} tokens per device and forward pass are more than memory can hold; "
      "use fewer rows, shorter ones, or gradient_accumulation_steps",
      "max_target_length",
    )
  elif tokens * training.gradient_accumulation_steps > LARGEST:
    yield (
      "gradient_accumulation_steps",
      f"{tokens * training.gradient_accumulation_steps:.3g} tokens per device and step are more "
      f"than can be counted; use at most {max(1, int(LARGEST / tokens))}",
      "per_device_batch_size",
      "max_target_length",
    )


def _tiles(config: Config) -> Iterator[Problem]:
  tiles, length = config.memory.num_vocab_tiling, config.training.max_target_length
  if tiles and length % tiles:
    near = max(n for n in range(1, min(tiles, length) + 1) if length % n == 0)
    yield (
      "num_vocab_tiling",
      f"{tiles} tiles do not cut {length} tokens evenly; use {near}, or 0 to have it chosen",
      "max_target_length",
    )


def _held_out(config: Config) -> Iterator[Problem]:
  data, interval = config.data, config.eval.eval_interval
  if interval > 0 and not data.eval_fraction and data.dataset_type == "text":
    yield (
      "eval_interval",
      "with eval_fraction=0 no document is held out to evaluate; set it above 0, or "
      "eval_interval=-1",
      "eval_fraction",
    )


def settle(config: Config, found: Iterable[Problem], failed: Iterable[str] = ()) -> list[Complaint]:
  """From problems to complaints at the place of highest precedence among their keys.

  Each names the values and places of the other keys. Problems with `failed` keys are not new.
  """
  made, sources = [], config.sources
  for key, problem, *others in found:
    if not {key, *others} & set(failed):
      first, *rest = sorted(dict.fromkeys([key, *others]), key=lambda k: -sources[k].level)
      origins = [f"{k}={brief(sources[k].text, 30)}, {sources[k].where}" for k in rest]
      context = f" ({'; '.join(origins)})" if origins else ""
      made.append(Complaint(sources[first].where, sources[first].typed, problem + context))
  return made
