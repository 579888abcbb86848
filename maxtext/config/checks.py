"""What sections and files demand of each other, whatever the devices are.

Each check yields (key, problem, *other keys). The complaint is made at the key that was set with
most precedence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from maxtext.bounds import LARGEST
from maxtext.config import stages
from maxtext.config.complaints import Complaint
from maxtext.config.config import RULES, Config
from maxtext.config.decoder import ELSEWHERE, in_effect
from maxtext.config.needs import NEEDS
from maxtext.config.sections import SECTION_OF, hint_of
from maxtext.config.sources import ENVIRONMENT, PRESET
from maxtext.config.values import Unfit, brief, coerce, shown
from maxtext.errors import closest

# What decides which blocks the layers are, and which width their experts have.
DECIDERS = (
  "layer_pattern",
  "first_num_dense_layers",
  "interleave_moe_layer_step",
  "nope_layer_interval",
  "base_moe_mlp_dim",
  "base_num_decoder_layers",
)

Problem = tuple[str, ...]
# to read: what training does, but nothing is written; to launch: to train, on another machine
Purpose = Literal["train", "read", "decode", "launch"]


def of_run(config: Config, purpose: Purpose, environ: Mapping[str, str]) -> Iterator[Problem]:
  """What is wrong whatever the devices are."""
  yield from _presets(config)
  yield from _unused(config)
  yield from _rules(config)
  yield from _model(config)
  yield from stages.of_layers(config)
  yield from _names(config)
  yield from _prompts(config)
  yield from _virtual_devices(config, environ)
  yield from _cached(config)
  if purpose != "decode":
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


def _rules(config: Config) -> Iterator[Problem]:
  """Rules of one's own that name a mesh axis which this mesh does not have."""
  axes = config.mesh.mesh_axes
  for setting in config.history[RULES][1:]:
    try:
      rules = coerce(hint_of(RULES), setting.node)
    except Unfit:  # which is said already
      continue
    for name, given in rules.items():
      if lost := [axis for axis in given if axis not in axes]:
        problem = f"{name} names {lost[0]!r}, which mesh_axes does not"
        yield RULES, f"{problem}; add it there, or leave it out of the rule", "mesh_axes"


def _cached(config: Config) -> Iterator[Problem]:
  """A kernel that cannot attend a cache whose slots the mesh splits."""
  mesh, kernel = config.mesh, config.kernel.attention
  axes = mesh.logical_axis_rules.get("cache_sequence", ())
  keys = [key for axis in axes for key in mesh.keys(axis) if getattr(mesh, key) != 1]
  if keys and kernel not in ("autoselected", "blockwise"):
    problem = f"a cache that {axes[0]!r} splits is attended by 'blockwise', not by {kernel!r}"
    yield "attention", f"{problem}; use autoselected", *keys


def _unused(config: Config) -> Iterator[Problem]:
  """Keys that were set, and that nothing reads in this run."""
  given = [k for k, s in SECTION_OF.items() if s == "architecture" and config.differs(k)]
  for key in given:
    if key not in config.block.uses:
      yield (
        key,
        f"decoder block {shown(config.block.name)} does not use it; leave it away",
        "decoder_block",
      )
  unread = _unread(config)
  for key in filter(unread.__contains__, given):
    if not any(_rests(config, key, decider) for decider in DECIDERS):
      others = [each for each in DECIDERS[:-1] if each in given]
      yield key, "none of this model's layers uses it; leave it away", *others
  for need in NEEDS:
    if not need.holds(config):
      for key in filter(config.differs, need.keys):
        if not _rests(config, key, need.decider):
          problem = f"has an effect only with {need.words}; set that, or leave {key} away"
          yield key, problem, need.decider


def _unread(config: Config) -> set[str]:
  """The architecture keys of the block file that none of its blocks in use needs."""
  return config.block.uses - ELSEWHERE - in_effect(config.block, config.architecture)


def idle(config: Config) -> set[str]:
  """The keys that have no effect in this run, and may wait in a file for another."""
  return _unread(config).union(*(need.keys for need in NEEDS if not need.holds(config)))


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
  named = data.evaluated or data.dataset_type == "synthetic"
  if interval > 0 and not data.eval_fraction and not named:
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
