"""What a number of devices demands of the mesh, of the batches and of the sizes that are split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from maxtext.config import stages
from maxtext.config.checks import Problem, settle
from maxtext.config.complaints import lines
from maxtext.config.config import Config
from maxtext.errors import ConfigError, ConfigErrors
from maxtext.training.sections import rows

LENGTH, STREAM = "activation_length", "activation_norm_length"  # in layers, and between them

# Logical axes whose size the configuration knows: the key that sets it, and what it counts.
DIMENSIONS = (
  ("embed", "base_emb_dim", "channels"),
  ("mlp", "base_mlp_dim", "mlp channels"),
  ("mlp", "base_moe_mlp_dim", "channels of an expert"),
  ("mlp", "base_shared_mlp_dim", "channels of shared experts"),
  ("heads", "base_num_query_heads", "query heads"),
  ("q_heads", "base_num_query_heads", "query heads"),
  ("kv_heads", "base_num_kv_heads", "kv heads"),
  ("kv_heads", "gdn_num_key_heads", "key heads of delta nets"),
  ("heads", "gdn_num_value_heads", "value heads of delta nets"),
  ("exp", "num_experts", "experts"),
  ("vocab", "vocab_size", "rows of the vocabulary"),
  ("position", "trainable_position_size", "learned positions"),
  ("kv", "head_dim", "channels of a head"),
  ("kv_head_dim", "head_dim", "channels of a head"),
  ("activation_embed", "base_emb_dim", "channels"),
  ("activation_mlp", "base_mlp_dim", "mlp channels"),
  ("activation_mlp", "base_moe_mlp_dim", "channels of an expert"),
  ("activation_heads", "base_num_query_heads", "query heads"),
  ("activation_kv_heads", "base_num_kv_heads", "kv heads"),
  ("activation_vocab", "vocab_size", "rows of the vocabulary"),
  ("activation_kv", "head_dim", "channels of a head"),
)
# Logical axes of one array, of which a mesh axis can split one.
_TOKENS = ("activation_batch", LENGTH)
TOGETHER = (
  ("vocab", "embed"),
  ("layers", "embed", "mlp"),
  ("layers", "embed", "q_heads", "kv"),
  ("layers", "embed", "kv_heads", "kv_head_dim"),
  ("layers", "heads", "kv", "embed"),
  (*_TOKENS, "activation_embed"),
  (*_TOKENS, "activation_heads", "activation_kv"),
  (*_TOKENS, "activation_kv_heads", "activation_kv"),
  (*_TOKENS, "activation_mlp"),
  (*_TOKENS, "activation_vocab"),
)
EXPERTS = ("layers", "exp", "embed_no_exp", "mlp")


def on_devices(config: Config, devices: int) -> Iterator[Problem]:
  """What is wrong on this many devices: mesh, batches, and sizes that are split."""
  counted = ("devices",) if config.run.devices is not None else ()
  if next(config.mesh.complaints(), None):  # which is said already
    return
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
  yield from _typed(config, sizes)
  if config.memory.offloads and sizes.get("stage", 1) > 1:
    problem = f"{config.memory.remat_policy}: stages cannot keep activations in the hosts' memory"
    yield "remat_policy", f"{problem}; use minimal", *config.mesh.keys("stage")
  yield from _split(config, sizes)
  yield from _collisions(config, sizes)
  yield from stages.on_stages(config, sizes, devices)
  if config.mesh.ways(LENGTH, sizes) > 1:
    yield from unordered(config)
    yield from _attended(config, sizes)


def _typed(config: Config, sizes: Mapping[str, int]) -> Iterator[Problem]:
  """What JAX's types of arrays cannot say of a layout; whatever the devices are, of one's own."""
  if config.mesh.shard_mode != "explicit":
    return
  remedy = "is beyond JAX's types of arrays; use shard_mode=auto"
  dropped = config.training.enable_dropout and any(
    b.attention and b.attention.dropout for b in config.blocks or ()
  )
  if dropped:
    problem = "dropout of attention's weights, which every device would draw alike,"
    yield "shard_mode", f"explicit: {problem} {remedy}", "enable_dropout"
  moved = ["optimizer_memory_host_offload"] * config.optimizer.optimizer_memory_host_offload
  if moved := [*moved, *["remat_policy"] * config.memory.offloads]:
    problem = "what moves between the hosts' memory and the devices'"
    yield "shard_mode", f"explicit: {problem} {remedy}", *moved
  if sizes.get("stage", 1) > 1:
    yield "shard_mode", f"explicit: one program of all stages {remedy}", *config.mesh.keys("stage")
  moves = config.architecture.mtp_num_layers or any(b.delta for b in config.blocks or ())
  if moves and config.mesh.ways(LENGTH, sizes) > 1:
    problem = "what delta nets and multi-token prediction take from neighbours in a split length"
    yield "shard_mode", f"explicit: {problem} {remedy}"


def unordered(config: Config) -> Iterator[Problem]:
  """What cannot have the tokens of a split length in an order that balances attention."""
  if not config.kernel.balances:
    return
  key, remedy = "context_parallel_load_balance", "use false"
  if config.architecture.mtp_num_layers or any(b.delta for b in config.blocks or ()):
    why = "moves tokens, whose order delta nets and multi-token prediction go by"
    yield key, f"{why}; {remedy}"
  if config.moes and config.experts.capacity_factor > 0 and not config.experts.sparse_matmul:
    why = "moves tokens, of which the first ones find room with a capacity_factor"
    yield key, f"{why}; {remedy}", "capacity_factor"


def _attended(config: Config, sizes: Mapping[str, int]) -> Iterator[Problem]:
  """Attention that cannot be computed with the length in parts."""
  mesh, kernel, rules = config.mesh, config.kernel, config.mesh.logical_axis_rules
  heads, keys = ("activation_heads", "activation_kv_heads")
  over = [[a for a in rules.get(name, ()) if sizes.get(a, 1) > 1] for name in (heads, keys)]
  ways = mesh.ways(LENGTH, sizes)
  where = [k for a in rules.get(LENGTH, ()) for k in mesh.keys(a) if getattr(mesh, k) != 1]
  if over[0] != over[1]:
    problem = f"{heads} goes to {over[0]} and {keys} to {over[1]}; where the length is split they "
    yield "logical_axis_rules", f"{problem}must go to the same mesh axes, as in the default", *where
  elif kernel.context_parallel_strategy == "ring":
    if kernel.attention not in ("autoselected", "blockwise"):
      problem = f"ring attention is computed by 'blockwise', not by {kernel.attention!r}"
      yield "attention", f"{problem}; use autoselected", "context_parallel_strategy"
  elif (
    kernel.context_parallel_strategy == "ulysses" and "base_num_query_heads" in config.block.uses
  ):
    own = config.architecture.sizes()["base_num_query_heads"] // mesh.ways(heads, sizes)
    if own % ways:
      fit = _fit(own)
      problem = (
        f"{own} query heads on a device cannot change places with {ways} parts of the length"
      )
      advice = f"; split it in {fit}, or use context_parallel_strategy=all_gather"
      yield "context_parallel_strategy", problem + advice, "base_num_query_heads", *where


def _collisions(config: Config, sizes: Mapping[str, int]) -> Iterator[Problem]:
  """Mesh axes that would split two dimensions of one array."""
  rules, said = config.mesh.logical_axis_rules, set()
  for together in (*TOGETHER, *([EXPERTS] if config.moes else ())):
    used: dict[str, str] = {}
    for name in together:
      for axis in rules.get(name, ()):
        if sizes.get(axis, 1) > 1 and axis in used and (used[axis], name) not in said:
          said.add((used[axis], name))
          yield (
            "logical_axis_rules",
            f"{used[axis]} and {name} of one array both go to mesh axis {axis!r} of size "
            f"{sizes[axis]}; it can split one of them: take it out of the other's rule, or set its "
            "size to 1",
          )
        used[axis] = name


def _fit(size: int) -> str:
  """The numbers that divide it, for a sentence."""
  return ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)


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
  mesh, said = config.mesh, set()
  architecture = config.architecture
  model = {**vars(architecture), **architecture.sizes()}
  for logical, key, words in DIMENSIONS:
    ways, size = mesh.ways(logical, sizes), model[key]
    axes = [a for a in mesh.logical_axis_rules.get(logical, ()) if sizes.get(a, 1) > 1]
    if size and size % ways and (key, ways) not in said and key in config.block.uses:
      said.add((key, ways))
      split = " x ".join(f"{axis} {sizes[axis]}" for axis in axes)
      keys = [k for axis in axes for k in mesh.keys(axis) if getattr(mesh, k) != 1]
      near = -(-size // ways) * ways
      problem = f"{size} {words} cannot be split over {split}; divisors are {_fit(size)}"
      yield key, f"{problem}; or use {key}={_scaled(config, key, near)}", *keys


def _scaled(config: Config, key: str, size: int) -> int:
  """The value of the key that gives this size, before `global_parameter_scale`."""
  made, given = config.architecture.sizes().get(key), getattr(config.architecture, key)
  return size if not given or not made else -(-size * given // made)


def check_devices(config: Config, devices: int) -> None:
  """Raises ConfigErrors where mesh, batches and sizes do not fit this many devices."""
  if found := settle(config, on_devices(config, devices)):
    raise ConfigErrors(lines(found))
