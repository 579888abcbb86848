"""From logical axis names to shardings: the one place where the two vocabularies meet.

A parameter or an activation names its dimensions; `Rules` says over which mesh axes each name is
split.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maxtext import mesh as meshes
from maxtext.errors import ConfigError, closest

Axes = Sequence[str | None]
LENGTH = "activation_length"
SLOTS = "cache_sequence"  # of a cache
STREAM = ("activation_batch", "activation_norm_length", "activation_embed")  # between layers
Entry = str | tuple[str, ...] | None  # of a PartitionSpec: the mesh axes of one dimension


def make_mesh(section: meshes.Mesh, devices: Sequence[jax.Device]) -> Mesh:
  """The device mesh of a run: slices (DCN) outermost within each axis, then the chips of a slice
  (ICI).
  """
  names = tuple(section.mesh_axes)
  ici, dcn = section.ici(len(devices)), section.dcn()
  sizes = [ici[name] for name in names], [dcn[name] for name in names]
  try:
    grid = _grid(*sizes, devices, section.allow_split_physical_axes)
  except NotImplementedError:  # how JAX says that it would have to split a dimension
    raise _no_torus(ici, devices) from None
  kind = AxisType.Explicit if section.shard_mode == "explicit" else AxisType.Auto
  return Mesh(grid, names, axis_types=(kind,) * len(names))


def _grid(
  ici: Sequence[int], dcn: Sequence[int], devices: Sequence[jax.Device], split: bool
) -> np.ndarray:
  """The devices by mesh axis, of these sizes within slices and over them."""
  if math.prod(dcn) == 1:
    return mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=split)
  if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
    return mesh_utils.create_hybrid_device_mesh(ici, dcn, devices, allow_split_physical_axes=split)
  # virtual devices have no slices: lay them out as if each slice were a run of neighbours
  grid = np.asarray(devices).reshape(*dcn, *ici)
  order = [axis for pair in zip(range(len(ici)), range(len(ici), 2 * len(ici))) for axis in pair]
  return grid.transpose(order).reshape([d * i for d, i in zip(dcn, ici)])


def _no_torus(ici: Mapping[str, int], devices: Sequence[jax.Device]) -> ConfigError:
  """That no choice of whole dimensions of a slice of chips gives axes of these sizes."""
  across = zip(*(getattr(device, "coords", ()) for device in devices))
  sides = " x ".join(str(len(set(places))) for places in across)
  sizes = " x ".join(f"{name} {size}" for name, size in ici.items() if size > 1)
  return ConfigError(
    "allow_split_physical_axes",
    f"a slice of {sides} chips has no whole dimensions for {sizes}: make each size a product of "
    "some of its sides, or set this to true, and axes share links",
  )


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axis -> the mesh axes that split it, outermost first, e.g. {'mlp': ('tensor',)}."""

  table: Mapping[str, tuple[str, ...]]

  def spec(
    self, axes: Axes, sizes: Mapping[str, int], shape: Sequence[int], name: str = ""
  ) -> PartitionSpec:
    """The PartitionSpec of array `name` with these logical axes and shape, on a mesh of these
    sizes.

    Mesh axes of size 1 drop out. Raises ConfigError for a name without a rule, for a mesh axis that
    would split two dimensions, and for a dimension that does not divide.
    """
    used: dict[str, str | None] = {}
    spec: list[Entry] = []
    for axis, size in zip(axes, shape, strict=True):
      if axis is not None and axis not in self.table:
        raise ConfigError("logical_axis_rules", f"no rule for {axis!r}{closest(axis, self.table)}")
      taken = tuple(m for m in self.table.get(axis, ()) if sizes.get(m, 1) > 1) if axis else ()
      for m in taken:
        if m in used:
          raise ConfigError(
            "logical_axis_rules",
            f"{used[m]} and {axis} of {name or tuple(axes)} both go to mesh axis {m!r}; "
            f"an axis can split one dimension, take it out of one of the two rules",
          )
        used[m] = axis
      ways = math.prod(sizes[m] for m in taken)
      if size % ways:
        raise ConfigError(
          "logical_axis_rules",
          f"{axis}={size} of {name or tuple(axes)} does not divide by "
          f"{' x '.join(taken)} = {ways}; use a size that is a multiple of {ways}, or a "
          f"parallelism of {math.gcd(size, ways)}",
        )
      spec.append(entry_of(taken))
    return PartitionSpec(*spec)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh and the rules that place arrays on it.

  Axes that are `idle` split parameters, which are joined in use, and no activation. Those `around`
  split a dimension that a vmap adds to every array.
  """

  mesh: Mesh
  rules: Rules
  idle: tuple[str, ...] = ()
  around: tuple[str, ...] = ()

  def sharding(self, axes: Axes, shape: Sequence[int], name: str = "") -> NamedSharding:
    """Where an array with these logical axes and shape stands."""
    return NamedSharding(self.mesh, self.rules.spec(axes, self.mesh.shape, shape, name))

  def gathered(self, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """Where a parameter stands in use: whole along every mesh axis that splits tokens."""
    split = self.rules.spec(axes, self.mesh.shape, shape)
    left = [tuple(m for m in names_of(entry) if m not in self._joined) for entry in split]
    return NamedSharding(self.mesh, PartitionSpec(*map(entry_of, left)))

  def shares(self, axes: Axes, shape: Sequence[int]) -> tuple[list[tuple[str, ...]], PartitionSpec]:
    """The mesh axes that gathering a parameter leaves out, by dimension; and how the parameter is
    split when they come innermost.
    """
    split = map(names_of, self.rules.spec(axes, self.mesh.shape, shape))
    new = [tuple(m for m in names if m in self._joined) for names in split]
    kept = map(names_of, self.gathered(axes, shape).spec)
    return new, PartitionSpec(*(entry_of(old + more) for old, more in zip(kept, new)))

  def splits(self, axis: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis, outermost first."""
    return tuple(m for m in self.rules.table.get(axis, ()) if self.mesh.shape.get(m, 1) > 1)

  def ways(self, axis: str) -> int:
    """Into how many parts a logical axis is split."""
    return math.prod(self.mesh.shape[m] for m in self.splits(axis))

  @property
  def explicit(self) -> bool:
    """Whether the types of arrays say how they are split, and no compiler decides it."""
    return AxisType.Explicit in self.mesh.axis_types

  @property
  def tokens(self) -> PartitionSpec:
    """How [b t ...] is split into tokens: the first two dimensions, the others whole."""
    return PartitionSpec(entry_of(self.splits("activation_batch")), entry_of(self.splits(LENGTH)))

  @property
  def token_axes(self) -> tuple[str, ...]:
    """The mesh axes that split the tokens: rows first, then the length."""
    return (*self.splits("activation_batch"), *self.splits(LENGTH))

  @property
  def _joined(self) -> tuple[str, ...]:
    return (*self.token_axes, *self.idle)

  @property
  def batch_ways(self) -> int:
    """Into how many parts the batch is split."""
    return self.ways("activation_batch")

  def even(self, rows: jax.Array) -> bool:
    """Whether [b t ...] divides by what splits its tokens."""
    return rows.shape[0] % self.batch_ways == 0 and rows.shape[1] % self.ways(LENGTH) == 0

  def inside(self, axis: str) -> Layout:
    """For what a vmap over this mesh axis runs: it splits nothing there."""
    table = {name: tuple(m for m in axes if m != axis) for name, axes in self.rules.table.items()}
    return Layout(self.mesh, Rules(table), self.idle, (axis,))

  def with_whole_lengths(self) -> Layout:
    """The same mesh and parameters, for tokens that come one by one: no length is split, and caches
    have all layers.
    """
    whole = {name: () for name in self.rules.table if "length" in name or name == "layers"}
    return Layout(self.mesh, Rules({**self.rules.table, **whole}), self.splits(LENGTH))


_active: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def use(layout: Layout | None, apart: bool = False) -> Iterator[None]:
  """While inside, what is traced of the functions below places arrays by `layout`. With `apart` it
  is a program of one device, whose arrays have no types that say how they are split.
  """
  token = _active.set(layout)
  mesh = None
  if layout is not None and layout.explicit and not apart:
    mesh = layout.mesh.abstract_mesh
  try:
    with _NOTHING if mesh is None else jax.sharding.use_abstract_mesh(mesh):
      yield
  finally:
    _active.reset(token)


def within(layout: Layout, function: Callable) -> Callable:
  """The function, which places arrays by `layout` on the way back as well, where it is traced only
  after `use` has ended.
  """

  @jax.custom_vjp
  def placed(*args: Any) -> Any:
    with use(layout):
      return function(*args)

  def forward(*args: Any) -> tuple[Any, Callable]:
    with use(layout):
      return jax.vjp(function, *args)

  def backward(pull: Callable, g: Any) -> tuple:
    with use(layout):
      return pull(g)

  placed.defvjp(forward, backward)
  return placed


def active() -> Layout | None:
  """The layout in use."""
  return _active.get()


def platform() -> str:
  """The kind of device that is traced for: that of the layout in use, or else JAX's default."""
  layout = _active.get()
  return jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Have the compiler lay `x` out by its logical axes; nothing happens outside `use`."""
  if (layout := _active.get()) is None or layout.mesh.size == 1:
    return x
  return place(x, layout.sharding(axes, x.shape).spec)


# The functions below know how JAX spells shardings, as constraints or in types.


def place(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """x, split over the mesh of the layout in use as `spec` says."""
  layout = _active.get()
  assert layout is not None
  if layout.explicit:
    return jax.sharding.reshard(x, spec)
  return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def alike(x: jax.Array, other: jax.Array) -> jax.Array:
  """x in the dtype of `other`, and where the types of arrays say how they are split, as that is."""
  split = jax.typeof(other).sharding
  x = x.astype(other.dtype)
  return jax.sharding.reshard(x, split) if AxisType.Explicit in split.mesh.axis_types else x


def by_device(function: Callable, inputs: Any, outputs: Any, axes: Sequence[str] = ()) -> Callable:
  """`function` of each device's parts of its arguments, which are split as `inputs` say: a
  PartitionSpec for each, or one for all; of the results the parts are as `outputs` say.

  With `axes` it is so over these alone: over the others of the mesh it stays one program.
  """
  layout = _active.get()
  assert layout is not None
  # neither Pallas calls nor loops that start from constants pass the check
  run = jax.shard_map(
    function,
    mesh=layout.mesh,
    in_specs=inputs,
    out_specs=outputs,
    axis_names=set(axes or layout.mesh.axis_names),
    check_vma=False,
  )
  if axes or not layout.explicit:
    return run
  is_spec = lambda x: isinstance(x, PartitionSpec)
  split = lambda spec, part: jax.tree.map(lambda x: jax.sharding.reshard(x, spec), part)
  specs = lambda args: (inputs,) * len(args) if is_spec(inputs) else inputs
  return lambda *args: run(*jax.tree.map(split, specs(args), args, is_leaf=is_spec))


def einsum(
  equation: str, *operands: jax.Array, like: jax.Array | None = None, **options: Any
) -> jax.Array:
  """As jax.numpy's. The result is split as `like` is, or else each dimension as the first operand
  that splits it, by what splits none before it; what is summed over is added up.
  """
  layout = _active.get()
  if layout is None or not layout.explicit:
    return jnp.einsum(equation, *operands, **options)
  inputs, out = equation.split("->")
  split = shares(out, [(out, like)] if like is not None else zip(inputs.split(","), operands))
  spec = PartitionSpec(*(entry_of(split[letter]) for letter in out))
  return jnp.einsum(equation, *operands, out_sharding=spec, **options)


def shares(out: str, given: Iterable[tuple[str, jax.Array]]) -> dict[str, tuple[str, ...]]:
  """The mesh axes that split each dimension of `out`, by its letter, as the types of the arrays say
  in which they are dimensions: the first that splits one counts, and an axis splits but one.
  """
  split: dict[str, tuple[str, ...]] = {}
  for letters, x in given:
    for letter, entry in zip(letters, jax.typeof(x).sharding.spec):
      split[letter] = split.get(letter) or names_of(entry)
  used: set[str] = set()
  for letter in out:
    split[letter] = tuple(m for m in split[letter] if m not in used)
    used |= set(split[letter])
  return split


def joined(x: jax.Array) -> jax.Array:
  """What passes between layers [b t d], with as many tokens on a device as layers take in."""
  if (layout := _active.get()) is None or layout.splits(STREAM[1]) == layout.splits(LENGTH):
    return x
  return constrain(x, STREAM[0], LENGTH, STREAM[2])


@dataclasses.dataclass(frozen=True)
class Declared:
  """One parameter before it exists: its shape, dtype and the logical names of its dimensions."""

  shape: tuple[int, ...]
  dtype: np.dtype
  axes: tuple[str | None, ...]

  @property
  def stacked(self) -> bool:
    """Whether its first dimension counts layers."""
    return bool(self.axes) and (self.axes[0] or "").startswith("layers")


def of(params: Mapping[str, Declared], layout: Layout) -> dict[str, NamedSharding]:
  """Where each parameter stands, read from its own axis names; raises ConfigError naming the
  parameter.
  """
  return {name: layout.sharding(p.axes, p.shape, name) for name, p in params.items()}


def split_further(
  spec: PartitionSpec, sizes: Mapping[str, int], shape: Sequence[int], axis: str
) -> PartitionSpec:
  """The same with the first dimension that divides split over mesh axis `axis` besides, if that
  splits none yet.
  """
  split, ways = list(map(names_of, spec)), sizes.get(axis, 1)
  if ways > 1 and not any(axis in names for names in split):
    for i, (names, size) in enumerate(zip(split, shape)):
      if size % (ways * math.prod(sizes[m] for m in names)) == 0:
        split[i] = (*names, axis)
        break
  return PartitionSpec(*map(entry_of, split))


def names_of(entry: Entry) -> tuple[str, ...]:
  """The mesh axes of one dimension."""
  return (entry,) if isinstance(entry, str) else entry or ()


def entry_of(names: tuple[str, ...]) -> Entry:
  """The same as a PartitionSpec spells them."""
  return None if not names else names[0] if len(names) == 1 else names
