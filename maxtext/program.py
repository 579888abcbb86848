"""Config -> Program: the one assembly of mesh, model, state and step, for every entry point."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maxtext import kernels, sharding
from maxtext.config import Config
from maxtext.config.devices import unordered
from maxtext.config.run import Run
from maxtext.config.sources import ENVIRONMENT
from maxtext.config.values import brief
from maxtext.errors import ConfigError
from maxtext.kernels.context import balanced_order
from maxtext.layers.decoder import Decoder
from maxtext.layers.merging import Params, Plan, parameters
from maxtext.layers.params import Compute
from maxtext.layers.schedule import STAGE, Schedule
from maxtext.objectives.next_token import NextToken, Sums
from maxtext.specs import DecoderSpec
from maxtext.training import step as steps
from maxtext.training.guardian import Guard
from maxtext.training.optimizers import make_optimizer
from maxtext.training.schedules import make_schedule
from maxtext.training.state import State, place_like

COLUMNS = (
  "inputs",
  "inputs_position",
  "inputs_segmentation",
  "targets",
  "targets_position",
  "targets_segmentation",
)
HOST, DEVICE = "pinned_host", "device"  # kinds of memory
TILE = 2**26  # bytes of float32 logits on a device, in the loss of an unsplit batch
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run consists of, before any memory is used: functions to compile and the shapes they
  take.
  """

  config: Config
  layout: sharding.Layout
  spec: DecoderSpec
  plan: Plan
  objective: NextToken
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  balanced: bool = False  # whether the tokens of a row are spread for causal attention

  @property
  def stages(self) -> list[tuple[int, int]]:
    """(blocks, repeats) of each stage, by which layers are numbered elsewhere."""
    return stages(self.spec)

  @property
  def pipeline(self) -> Schedule | None:
    """How microbatches go through the stages, if the mesh has any."""
    stage, ways = self.spec.stages[self.spec.longest], self.layout.mesh.shape.get(STAGE, 1)
    section = self.config.pipeline
    return None if ways == 1 else section.schedule(ways, stage.repeat, len(stage.blocks))

  @functools.cached_property
  def state(self) -> State:
    """The state's shapes, dtypes and shardings."""
    shapes = jax.eval_shape(self._fresh)
    whole = NamedSharding(self.layout.mesh, PartitionSpec())
    places = place_like(shapes, sharding.of(self.plan.declared, self.layout), whole)
    if own := self._moments:
      places = dataclasses.replace(places, opt_state=place_like(shapes.opt_state, own, whole))
    if self.config.optimizer.optimizer_memory_host_offload:
      host = lambda s, place: place.with_memory_kind(HOST) if s.ndim else place
      opt_state = jax.tree.map(host, shapes.opt_state, places.opt_state)
      places = dataclasses.replace(places, opt_state=opt_state)
    return jax.tree.map(
      lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )

  @property
  def _moments(self) -> dict[str, NamedSharding]:
    """Where the optimizer keeps what it has of a parameter, if not where the parameter stands."""
    if not self.config.mesh.shard_optimizer_over_data:
      return {}
    mesh, places = self.layout.mesh, sharding.of(self.plan.declared, self.layout)
    spec = lambda name, p: sharding.split_further(places[name].spec, mesh.shape, p.shape, "data")
    return {name: NamedSharding(mesh, spec(name, p)) for name, p in self.plan.declared.items()}

  @functools.cached_property
  def shardings(self) -> State:
    """Where every array of the state stands."""
    return jax.tree.map(lambda s: s.sharding, self.state)

  def batch(self, rows: int) -> Batch:
    """The shapes and shardings of a batch of this many rows."""
    shape = (rows, self.config.training.max_target_length)
    place = self.layout.sharding(("activation_batch", "activation_length"), shape, "the batch")
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for name in COLUMNS}

  @functools.cached_property
  def init(self) -> jax.stages.Wrapped:
    """() -> State, with parameters drawn from `init_weights_seed`, born sharded."""
    return jax.jit(self._fresh, out_shardings=self.shardings, compiler_options=self._hasty)

  @functools.cached_property
  def begin(self) -> Callable[[Params], State]:
    """params -> State at step 0, for parameters from elsewhere; takes over their memory."""
    return jax.jit(
      self._around, out_shardings=self.shardings, donate_argnums=0, compiler_options=self._hasty
    )

  @functools.cached_property
  def step(self) -> jax.stages.Wrapped:
    """(State, batch) -> (State, metrics); takes over the state's memory."""
    rules = _step_rules(self.config, self.spec, self._moments)
    rules = dataclasses.replace(rules, guard=self.guard)
    if self.config.optimizer.optimizer_memory_host_offload:
      rules = dataclasses.replace(rules, near=self._at(DEVICE), far=self._at(HOST))
    train = steps.make_step(self._loss, self.optimizer, self.schedule, rules)

    def placed(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
      with sharding.use(self.layout):
        return train(state, batch)

    options = self.config.compile.options(self.layout.mesh.devices.flat[0].device_kind)
    return jax.jit(
      placed, donate_argnums=0, out_shardings=(self.shardings, None), compiler_options=options
    )

  @property
  def traced(self) -> jax.stages.Traced:
    """The step of this run's batches, traced: what training compiles."""
    rows = self.config.training.global_batch(self.layout.mesh.size)
    return self.step.trace(self.state, self.batch(rows))

  @functools.cached_property
  def evaluate(self) -> Callable[[Params, Batch], Sums]:
    """(params, batch) -> the objective's sums by name, without dropout."""
    return jax.jit(self._loss)

  def _loss(self, params: Params, batch: Batch, key: jax.Array | None = None) -> Sums:
    with sharding.use(self.layout):
      batch = _spread(batch, self.layout) if self.balanced else batch
      return self.objective(self.plan.merge(params), batch, key)

  def _at(self, kind: str) -> Callable[[Any], Any]:
    """opt_state -> the same in this kind of memory of the devices on which it stands."""

    def moved(x: jax.Array, place: NamedSharding) -> jax.Array:
      return jax.device_put(x, place.with_memory_kind(kind)) if x.ndim else x

    return lambda opt_state: jax.tree.map(moved, opt_state, self.shardings.opt_state)

  def _fresh(self) -> State:
    with sharding.use(self.layout):
      rngs = nnx.Rngs(params=self.config.run.init_weights_seed)
      return self._around(parameters(self.plan.build(rngs)))

  def _around(self, params: Params) -> State:
    history = self.guard.history() if self.guard else None
    return State(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), history)

  @functools.cached_property
  def guard(self) -> Guard | None:
    """What keeps a step from being applied besides a loss that ends the run."""
    training = self.config.training
    if not (training.skip_step_on_spikes or training.rollback_limit):
      return None
    stacked = {name for name, p in self.plan.declared.items() if p.axes[0] == "layers"}
    factor = training.skip_step_scaling_factor if training.skip_step_on_spikes else 0.0
    return Guard(frozenset(stacked), training.skip_step_interval, factor)

  @property
  def _hasty(self) -> dict[str, int]:
    """Compiler options of what runs once: on a CPU, optimising it takes longer than running it."""
    cpu = self.layout.mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 1} if cpu else {}


def build(
  config: Config, devices: Sequence[jax.Device] | None = None, vocabulary: int = 0
) -> Program:
  """Assemble the run that `config` describes on these devices (default: all there are).

  `vocabulary` is the tokenizer's size, used where the configuration leaves `vocab_size` open.
  Raises ConfigError where mesh, rules and model do not fit each other.
  """
  mesh = sharding.make_mesh(config.mesh, find_devices(config.run) if devices is None else devices)
  rules = {name: tuple(axes) for name, axes in config.mesh.logical_axis_rules.items()}
  layout = sharding.Layout(mesh, sharding.Rules(rules))
  spec = config.decoder(padded(vocabulary))
  if spec.vocab < vocabulary:
    raise ConfigError(
      "vocab_size",
      f"{spec.vocab} rows are fewer than the tokenizer's {vocabulary} tokens; use null",
    )
  schedule = make_schedule(config.optimizer, config.training.steps)
  balanced = layout.ways(sharding.LENGTH) > 1 and config.kernel.balances
  _check_memory(config, layout)
  for where, problem, *_ in unordered(config) if balanced else ():
    raise ConfigError(where, problem)
  return Program(
    config=config,
    layout=layout,
    spec=spec,
    plan=plan(config, spec),
    objective=NextToken(
      z_loss=config.training.z_loss_multiplier,
      tiles=tiles(config, spec, layout.mesh.size, bool(layout.token_axes)),
      ordered=not balanced,
      mtp=config.training.mtp_loss_scaling_factor,
      balance=config.training.load_balance_loss_weight,
    ),
    schedule=schedule,
    optimizer=make_optimizer(config.optimizer, schedule),
    balanced=balanced,
  )


def _check_memory(config: Config, layout: sharding.Layout) -> None:
  """Refuses to move to the hosts what is there already."""
  key, remedy = "optimizer_memory_host_offload", "false"
  if config.memory.offloads:
    key, remedy = "remat_policy", "minimal, or in custom device in place of offload"
  elif not config.optimizer.optimizer_memory_host_offload:
    return
  if layout.mesh.devices.flat[0].platform == "cpu":
    raise ConfigError(key, f"the memory of CPU devices is the host's already; use {remedy}")


def _spread(batch: Batch, layout: sharding.Layout) -> Batch:
  """The columns [b t] with the tokens of each row in an order that balances causal attention.

  Positions and documents are columns too, so nothing that is computed of the tokens changes.
  """

  def spread(x: jax.Array) -> jax.Array:
    order = balanced_order(x.shape[1], layout.ways(sharding.LENGTH))
    x = sharding.constrain(x, "activation_batch", None)[:, order]
    return sharding.constrain(x, "activation_batch", sharding.LENGTH)

  return {name: spread(x) for name, x in batch.items()}


def plan(config: Config, spec: DecoderSpec) -> Plan:
  """The model without its parameters, whatever the devices."""
  return Plan.of(
    functools.partial(Decoder, spec, _compute(config), config.memory, pipeline=config.pipeline)
  )


def stages(spec: DecoderSpec) -> list[tuple[int, int]]:
  """(blocks, repeats) of each stage."""
  return [(len(stage.blocks), stage.repeat) for stage in spec.stages]


def build_to_decode(config: Config, vocabulary: int = 0) -> Program:
  """As `build`, on a mesh of its own: that of training suits neither a few rows nor other devices.

  Mesh sizes that were typed for this command or stand in the environment are obeyed, and so are
  those of a set of mesh axes without fsdp.
  """
  devices, mesh = find_devices(config.run), config.mesh
  sizes = [key for key in vars(mesh) if key.endswith("_parallelism") or key == "num_slices"]
  typed = any(config.sources[key].level >= ENVIRONMENT for key in sizes)
  if "fsdp" in mesh.mesh_axes and not typed:
    own: dict[str, Any] = dict.fromkeys(sizes, 1) | {"ici_fsdp_parallelism": -1}
    mesh = dataclasses.replace(mesh, **own)
    alone = devices[0].platform == "cpu" and jax.process_count() == 1
    devices = devices[:1] if alone else devices
  # there is no optimizer, and nothing is kept for a gradient
  optimizer = dataclasses.replace(config.optimizer, optimizer_memory_host_offload=False)
  memory = dataclasses.replace(config.memory, remat_policy="none")
  config = dataclasses.replace(config, mesh=mesh, optimizer=optimizer, memory=memory)
  return build(config, devices, vocabulary)


def find_devices(run: Run) -> list[jax.Device]:
  """The devices to compute on; raises ConfigError where the hardware that the run names is not
  there.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:  # an assertion where the platform's plugin fails
    what = brief((str(error).splitlines() or ["JAX finds no such device"])[0], 120)
    raise ConfigError(
      "hardware",
      f"{run.hardware}: {what}; use hardware=auto or cpu, or install the extra for this hardware",
    ) from None


def padded(vocabulary: int) -> int:
  """A tokenizer's size rounded up so that every usual mesh divides it; the rows above it are never
  used.
  """
  return -(-vocabulary // 64) * 64


def tiles(config: Config, spec: DecoderSpec, devices: int, split: bool) -> int:
  """Into how many parts of the length the loss is cut: as asked, else so that one is within TILE.

  Where tokens are `split` it is one: devices send their shares of the unembedding's gradient for
  every tile, which only lack of memory is a reason for.
  """
  length = config.training.max_target_length
  if config.memory.num_vocab_tiling or split:
    return config.memory.num_vocab_tiling or 1
  row = 4 * spec.vocab * config.training.micro_batch(devices)
  fits = lambda tiles: length // tiles * row <= TILE * devices
  return next((n for n in range(1, length + 1) if length % n == 0 and fits(n)), length)


def _compute(config: Config) -> Compute:
  precision = config.precision
  named = precision.matmul_precision
  return Compute(
    dtype=jnp.dtype(precision.dtype),
    weight_dtype=jnp.dtype(precision.weight_dtype),
    kernel=kernels.Options.of(config.kernel.attention, functools.partial(getattr, config.kernel)),
    matmul_precision=None if named == "default" else named,
    f32_scores=precision.float32_qk_product,
    f32_logits=precision.logits_dot_in_fp32,
    f32_gate=precision.float32_gate_logits,
    experts=config.experts,
  )


def _step_rules(config: Config, spec: DecoderSpec, places: dict[str, NamedSharding]) -> steps.Rules:
  training = config.training
  return steps.Rules(
    accumulate=training.gradient_accumulation_steps,
    grad_dtype=config.precision.grad_dtype,
    clip=config.optimizer.gradient_clipping_threshold,
    abort_on_nan=training.abort_on_nan_loss,
    abort_on_inf=training.abort_on_inf_loss,
    dropout=training.enable_dropout,
    seed=config.run.init_weights_seed,
    mixtures=spec.mixtures,
    bias_rate=training.routed_bias_update_rate,
    places=places,
  )
