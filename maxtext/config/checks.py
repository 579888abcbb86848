"""What sections, files and devices demand of each other.

Each check yields (key, problem, *other keys); the complaint is made at the key that was set with most precedence.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from maxtext.bounds import LARGEST
from maxtext.config.complaints import Complaint, lines
from maxtext.config.config import Config
from maxtext.config.documents import shown as place
from maxtext.config.sections import SECTION_OF
from maxtext.config.values import brief, shown
from maxtext.errors import ConfigError, ConfigErrors, closest
from maxtext.training.sections import rows

Problem = tuple[str, ...]
Purpose = Literal["train", "decode"]

BYTES = 259  # vocabulary of the byte tokenizer
TEXT_FILES = (".txt", ".jsonl", ".md", ".py")

# Keys, what makes them count, and its words. A key that was set and does not count is refused.
NEEDS: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str, str], ...] = (
  (
    ("adam_b1", "adam_b2", "adam_eps", "adam_weight_decay", "adamw_mask", "mu_dtype"),
    lambda c: c.optimizer.opt_type == "adamw",
    "opt_type=adamw",
    "opt_type",
  ),
  (
    ("wsd_decay_steps_fraction",),
    lambda c: c.optimizer.lr_schedule_type == "wsd",
    "lr_schedule_type=wsd",
    "lr_schedule_type",
  ),
  (
    ("learning_rate_final_fraction",),
    lambda c: c.optimizer.lr_schedule_type != "constant",
    "another lr_schedule_type than constant",
    "lr_schedule_type",
  ),
  (
    ("eval_steps", "eval_per_device_batch_size", "eval_sample_prompt", "eval_sample_length"),
    lambda c: c.eval.eval_interval > 0,
    "an eval_interval of at least 1",
    "eval_interval",
  ),
  (
    ("grain_packing_type", "max_segments_per_seq"),
    lambda c: c.data.packing,
    "packing=true",
    "packing",
  ),
  (
    ("tokenizer_vocab_size",),
    lambda c: c.data.tokenizer_type == "bpe",
    "tokenizer_type=bpe",
    "tokenizer_type",
  ),
  (
    ("tokenizer_vocab_size",),
    lambda c: not c.data.tokenizer_path,
    "an empty tokenizer_path, since that file has its own size",
    "tokenizer_path",
  ),
  (
    ("decode_sampling_nucleus_p",),
    lambda c: c.decode.decode_sampling_strategy == "nucleus",
    "decode_sampling_strategy=nucleus",
    "decode_sampling_strategy",
  ),
  (
    ("decode_sampling_top_k",),
    lambda c: c.decode.decode_sampling_strategy == "topk",
    "decode_sampling_strategy=topk",
    "decode_sampling_strategy",
  ),
  (
    ("decode_sampling_temperature",),
    lambda c: c.decode.decode_sampling_strategy != "greedy",
    "another decode_sampling_strategy than greedy",
    "decode_sampling_strategy",
  ),
  (
    ("save_checkpoint_on_start", "checkpoint_period", "max_num_checkpoints_to_keep"),
    lambda c: c.checkpoint.enable_checkpointing,
    "enable_checkpointing=true",
    "enable_checkpointing",
  ),
)

# Logical axes whose size the configuration knows: the key that sets it, and what it counts.
DIMENSIONS = {
  "embed": ("base_emb_dim", "channels"),
  "mlp": ("base_mlp_dim", "mlp channels"),
  "heads": ("base_num_query_heads", "query heads"),
  "q_heads": ("base_num_query_heads", "query heads"),
  "kv_heads": ("base_num_kv_heads", "kv heads"),
  "kv": ("head_dim", "channels of a head"),
  "kv_head_dim": ("head_dim", "channels of a head"),
  "activation_embed": ("base_emb_dim", "channels"),
  "activation_mlp": ("base_mlp_dim", "mlp channels"),
  "activation_heads": ("base_num_query_heads", "query heads"),
  "activation_kv_heads": ("base_num_kv_heads", "kv heads"),
  "activation_kv": ("head_dim", "channels of a head"),
}


def of_run(config: Config, purpose: Purpose, environ: Mapping[str, str]) -> Iterator[Problem]:
  """What is wrong whatever the devices are."""
  yield from _presets(config)
  yield from _unused(config)
  yield from _model(config)
  yield from _names(config)
  yield from _virtual_devices(config, environ)
  yield from _written_files(config)
  if purpose == "train":
    yield from _batch_size(config)
    yield from _read_files(config)
  elif (path := config.decode.prompts_file) and not os.path.isfile(os.path.expanduser(path)):
    yield "prompts_file", f"{shown(path)}: no such file; name a text file with one prompt a line"


def _presets(config: Config) -> Iterator[Problem]:
  for key in config.preset_keys:
    if SECTION_OF[key] != "architecture":
      yield key, "a preset holds sizes only; set this in the run's file"


def _unused(config: Config) -> Iterator[Problem]:
  """Keys that were set, and that nothing reads in this run."""
  for key, section in SECTION_OF.items():
    if section == "architecture" and key not in config.block.uses and config.differs(key):
      block = brief(config.architecture.decoder_block)
      yield key, f"decoder block {block!r} does not use it; leave it away", "decoder_block"
  for keys, counts, words, decider in NEEDS:
    if not counts(config):
      for key in filter(config.differs, keys):
        yield key, f"has an effect only with {words}; set that, or leave {key} away", decider


def _model(config: Config) -> Iterator[Problem]:
  sizes, length = config.architecture, config.training.max_target_length
  uses = config.block.uses
  if "trainable_position_size" in uses and length > sizes.trainable_position_size:
    yield (
      "max_target_length",
      f"{length} tokens are longer than the learned positions; use at most {sizes.trainable_position_size}, "
      "or raise trainable_position_size",
      "trainable_position_size",
    )
  head = sizes.sizes()["head_dim"]
  if "rope_max_timescale" in uses and head % 2:
    others = ("head_dim",) if sizes.head_dim else ("base_emb_dim", "base_num_query_heads")
    yield (
      others[0],
      f"a head dimension of {head} is odd, and rotary positions turn pairs; make it even",
      *others[1:],
    )
  if sizes.vocab_size and config.data.dataset_type != "synthetic":
    bpe = config.data.tokenizer_type == "bpe"
    if bpe and config.data.tokenizer_path:
      return
    least = config.data.tokenizer_vocab_size if bpe else BYTES
    if sizes.vocab_size < least:
      yield (
        "vocab_size",
        f"{sizes.vocab_size} rows are fewer than the tokenizer's {least} tokens; "
        f"use at least {least}, or null",
        "tokenizer_vocab_size" if bpe else "tokenizer_type",
      )


def _names(config: Config) -> Iterator[Problem]:
  for key in config.run.resume_changes:
    if key not in SECTION_OF:
      yield "resume_changes", f"{shown(key)} is no key{closest(key, SECTION_OF) or '; name keys, as [steps]'}"


def _virtual_devices(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
  forced = config.run.forced_devices(environ)
  if config.run.devices is not None and forced not in (None, config.run.devices):
    yield (
      "devices",
      f"{config.run.devices} virtual devices, but XLA_FLAGS in the environment asks for {forced}; remove one",
    )


def _written_files(config: Config) -> Iterator[Problem]:
  """Places to write to that are files, or below files."""
  for key in ("base_output_directory", "jax_cache_dir", "tokenizer_cache_dir"):
    if text := config.values[key]:
      path = Path(os.path.expanduser(text))
      blocking = next((p for p in (path, *path.parents) if _is(os.path.exists, p)), None)
      if blocking is not None and not _is(os.path.isdir, blocking):
        yield key, f"{shown(text)}: {brief(place(blocking))} is a file, not a folder; name a folder"


def _is(question: Callable[[str], bool], path: Path) -> bool:
  return question(str(path))


def _batch_size(config: Config) -> Iterator[Problem]:
  training = config.training
  tokens = training.per_device_batch_size * training.max_target_length
  if tokens > LARGEST:
    yield (
      "per_device_batch_size",
      f"{tokens:.3g} tokens per device and forward pass are more than memory can hold; use fewer rows, "
      "shorter ones, or gradient_accumulation_steps",
      "max_target_length",
    )


def _read_files(config: Config) -> Iterator[Problem]:
  """Files that training will read and that are plainly absent."""
  data, checkpoint = config.data, config.checkpoint
  if data.dataset_type == "text" and (path := data.dataset_path) and not _has_text(path):
    kinds = " ".join(TEXT_FILES)
    yield "dataset_path", f"{shown(path)} holds no {kinds} file; name a file, folder or glob that does"
  if data.tokenizer_path and not os.path.isfile(os.path.expanduser(data.tokenizer_path)):
    offer = "name a tokenizer.json, or leave it empty to train one"
    yield "tokenizer_path", f"{shown(data.tokenizer_path)}: no such file; {offer}"
  for key in ("load_parameters_path", "load_full_state_path"):
    path = getattr(checkpoint, key)
    if path and not os.path.isdir(os.path.expanduser(path)):
      offer = "name a run's folder, or one of its checkpoints/STEP"
      yield key, f"{shown(path)}: no such folder; {offer}"


def _has_text(path: str) -> bool:
  """Whether a file, folder or glob leads to at least one file of text."""
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    found: Iterable[str] = (name for _, _, names in os.walk(path) for name in names)
  else:
    found = [path] if os.path.isfile(path) else glob.iglob(path, recursive=True)
  return any(name.lower().endswith(TEXT_FILES) for name in found)


def on_devices(config: Config, devices: int) -> Iterator[Problem]:
  """What is wrong on this many devices: mesh, batches, and sizes that are split."""
  counted = ("devices",) if config.run.devices is not None else ()
  try:
    sizes = config.mesh.sizes(devices)
  except ConfigError as e:
    yield e.where, e.problem, *counted
    return
  training, evaluation = config.training, config.eval
  ways = config.mesh.ways("activation_batch", sizes)
  yield from _batch("per_device_batch_size", training.per_device_batch_size, devices, ways)
  if evaluation.eval_interval > 0 and evaluation.eval_per_device_batch_size:
    per_device = evaluation.eval_per_device_batch_size
    yield from _batch("eval_per_device_batch_size", per_device, devices, ways)
  yield from _split(config, sizes)


def _batch(key: str, per_device: float, devices: int, ways: int) -> Iterator[Problem]:
  count = rows(per_device, devices)
  unit = f"a multiple of {ways / devices:g}"
  if not count:
    yield key, f"{per_device:g} rows on {devices} device(s) make {per_device * devices:g}; use {unit}"
  elif count % ways:
    yield key, f"{count} rows on {devices} devices cannot be split {ways} ways; use {unit}"


def _split(config: Config, sizes: Mapping[str, int]) -> Iterator[Problem]:
  """Dimensions of the model that do not divide by the mesh axes that split them."""
  mesh, model, said = config.mesh, config.architecture.sizes(), set()
  for logical, (key, words) in DIMENSIONS.items():
    ways, size = mesh.ways(logical, sizes), model[key]
    axes = [a for a in mesh.logical_axis_rules.get(logical, ()) if sizes.get(a, 1) > 1]
    if size % ways and (key, ways) not in said and key in config.block.uses:
      said.add((key, ways))
      split = " x ".join(f"{axis} {sizes[axis]}" for axis in axes)
      keys = [k for axis in axes for k in mesh.keys(axis) if getattr(mesh, k) != 1]
      fit = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
      problem = f"{size} {words} cannot be split over {split}; divisors are {fit}; or change {key}"
      yield key, problem, *keys


def check_devices(config: Config, devices: int) -> None:
  """Raises ConfigErrors where mesh, batches and sizes do not fit this many devices."""
  if found := settle(config, on_devices(config, devices)):
    raise ConfigErrors(lines(found))


def settle(config: Config, found: Iterable[Problem], failed: Iterable[str] = ()) -> list[Complaint]:
  """From problems to complaints at the place of highest precedence among their keys.

  Each names the values of the other keys, and their places. Problems with `failed` keys say nothing new.
  """
  made, sources = [], config.sources
  for key, problem, *others in found:
    if not {key, *others} & set(failed):
      first, *rest = sorted(dict.fromkeys([key, *others]), key=lambda k: -sources[k].level)
      origins = [f"{k}={brief(sources[k].text, 30)}, {sources[k].where}" for k in rest]
      context = f" ({'; '.join(origins)})" if origins else ""
      made.append(Complaint(sources[first].where, sources[first].typed, problem + context))
  return made
