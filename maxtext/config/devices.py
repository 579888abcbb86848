"""What a number of devices demands of the mesh, of the batches and of the sizes that are split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from maxtext.config.checks import Problem, settle
from maxtext.config.complaints import lines
from maxtext.config.config import Config
from maxtext.errors import ConfigError, ConfigErrors
from maxtext.training.sections import rows

LENGTH, STREAM = "activation_length", "activation_norm_length"  # in layers, and between them

# Logical axes whose size the configuration knows: the key that sets it, and what it counts.
DIMENSIONS = {
  "embed": ("base_emb_dim", "channels"),
  "mlp": ("base_mlp_dim", "mlp channels"),
  "heads": ("base_num_query_heads", "query heads"),
  "q_heads": ("base_num_query_heads", "query heads"),
  "kv_heads": ("base_num_kv_heads", "kv heads"),
  "exp": ("num_experts", "experts"),
  "kv": ("head_dim", "channels of a head"),
  "kv_head_dim": ("head_dim", "channels of a head"),
  "activation_embed": ("base_emb_dim", "channels"),
  "activation_mlp": ("base_mlp_dim", "mlp channels"),
  "activation_heads": ("base_num_query_heads", "query heads"),
  "activation_kv_heads": ("base_num_kv_heads", "kv heads"),
  "activation_kv": ("head_dim", "channels of a head"),
}


def on_devices(config: Config, devices: int) -> Iterator[Problem]:
  """What is wrong on this many devices: mesh, batches, and sizes that are split."""
  counted = ("devices",) if config.run.devices is not None else ()
  try:
    sizes = config.mesh.sizes(devices)
  except ConfigError as e:
    yield e.where, e.problem, *(("num_slices",) if e.where.startswith("dcn_") else counted)
    return
  training, evaluation = config.training, config.eval
  ways = config.mesh.ways("activation_batch", sizes)
  yield from _batch("per_device_batch_size", training.per_device_batch_size, devices, ways)
  if evaluation.eval_interval > 0 and evaluation.eval_per_device_batch_size:
    per_device = evaluation.eval_per_device_batch_size
    yield from _batch("eval_per_device_batch_size", per_device, devices, ways)
  yield from _length(config, sizes)
  yield from _split(config, sizes)


def _length(config: Config, sizes: Mapping[str, int]) -> Iterator[Problem]:
  """Rows that cannot be cut into as many parts as the mesh splits their length, or tiles of it."""
  mesh, length = config.mesh, config.training.max_target_length
  finer = length % mesh.ways(STREAM, sizes) and not length % mesh.ways(LENGTH, sizes)
  name = STREAM if finer else LENGTH
  axes = [a for a in mesh.logical_axis_rules.get(name, ()) if sizes.get(a, 1) > 1]
  if not axes:
    return
  split = " x ".join(f"{axis} {sizes[axis]}" for axis in axes)
  keys = [key for axis in axes for key in mesh.keys(axis) if getattr(mesh, key) != 1]
  ways, tiles = mesh.ways(name, sizes), max(config.memory.num_vocab_tiling, 1)
  problem = f"{length} tokens cannot be split over {split}"
  if length % ways:
    yield "max_target_length", f"{problem}; use a multiple of {ways}", *keys
  elif config.kernel.balances and length % (2 * ways):
    advice = f"in two chunks each; use a multiple of {2 * ways}, or "
    advice += "context_parallel_load_balance=false"
    yield "max_target_length", f"{problem} {advice}", "context_parallel_load_balance", *keys
  elif length % (ways * tiles):
    advice = f"in {tiles} tiles each; use a multiple of {ways * tiles}, or num_vocab_tiling=1"
    yield "max_target_length", f"{problem} {advice}", "num_vocab_tiling", *keys


LESS = "or split the batch less, as with more ici_tensor_parallelism"


def _batch(key: str, per_device: float, devices: int, ways: int) -> Iterator[Problem]:
  count = rows(per_device, devices)
  unit = f"a multiple of {ways / devices:g}"
  if not count:
    where = f"{devices} device{'s' * (devices > 1)}"
    yield key, f"{per_device:g} rows on {where} make {per_device * devices:g}; use {unit}"
  elif count % ways:
    yield key, f"{count} rows on {devices} devices cannot be split {ways} ways; use {unit}, {LESS}"


def _split(config: Config, sizes: Mapping[str, int]) -> Iterator[Problem]:
  """Dimensions of the model that do not divide by the mesh axes that split them."""
  mesh, model, said = config.mesh, config.architecture.sizes(), set()
  model["num_experts"] = config.architecture.num_experts
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
