"""One array of a cache: in which order its axes are stored, in how many bits, and on what mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from maxtext.errors import ConfigError
from maxtext.kernels.held import BLOCK, Held
from maxtext.sharding import SLOTS, Layout, active, by_device, constrain
from maxtext.specs import CacheQuantSpec

_CODES = {  # format -> how it is stored, and its greatest number
  "int8": (jnp.int8, 127.0),
  "int4": (jnp.int4, 7.0),
  "fp8": (jnp.float8_e4m3fn, 448.0),
}
_ROWS = "activation_batch"
_REST = ("activation_kv_heads", "activation_kv")


def axis_order(key: str, order: str | Sequence[int]) -> tuple[int, ...]:
  """The order that `key` gives: stored axis i is the axis order[i] of (batch, slot, head, width).

  '1,2,0,3' or the numbers themselves. Raises ConfigError at `key` for what is no permutation.
  """
  parts = order.split(",") if isinstance(order, str) else order
  try:
    axes = tuple(int(part) for part in parts)
  except (TypeError, ValueError):
    axes = ()
  if sorted(axes) != [0, 1, 2, 3]:
    given = order if isinstance(order, str) else ",".join(map(str, order))
    raise ConfigError(key, f"{given!r} is not an order of the four axes; use each of 0,1,2,3 once")
  return axes


@dataclasses.dataclass(frozen=True)
class Storage:
  """How a cache stores keys and values, which are read in `dtype`.

  `order` permutes (b s g k), see axis_order; `spans` are kept where masks have them; `block` slots
  are read at once by a kernel that reads blocks.
  """

  dtype: Any
  quant: CacheQuantSpec | None = None
  order: tuple[int, ...] = (0, 1, 2, 3)
  spans: bool = False
  block: int = BLOCK

  def __post_init__(self):
    axis_order("cache_axis_order", self.order)
    object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
    if self.block < 1:
      raise ConfigError("ragged_block_size", f"{self.block} is not at least 1")


def _static(default: Any = dataclasses.MISSING) -> Any:
  return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slab:
  """Keys, values [l b s g k] or marks [l b s] of all layers, permuted, as numbers or codes.

  data and scale as in Held; of a pool, b counts pages, and s a page's slots. `rows` is the logical
  axis that b stands for.
  """

  data: jax.Array
  scale: jax.Array | None
  storage: Storage = _static()
  order: tuple[int, ...] = _static()
  rows: str | None = _static(_ROWS)

  @classmethod
  def empty(cls, shape: Sequence[int], storage: Storage, rows: str | None = _ROWS) -> Slab:
    """Zeros for [l b s g k], or for marks [l b s], which are whole numbers and never permuted."""
    if len(shape) == 3:
      storage = Storage(jnp.int32, spans=storage.spans, block=storage.block)
    order = storage.order if len(shape) == 5 else (0, 1)
    stored = [shape[0], *(shape[1:][i] for i in order)]
    if storage.quant is None:
      return cls(jnp.zeros(stored, storage.dtype), None, storage, order, rows)._placed()
    shared = _shared(storage.quant)
    scales = [shape[0], *(1 if i in shared else shape[1:][i] for i in order)]
    data = jnp.zeros(stored, _CODES[storage.quant.format][0])
    return cls(data, jnp.ones(scales, jnp.float32), storage, order, rows)._placed()

  @property
  def shape(self) -> tuple[int, ...]:
    """The logical shape: [l b s ...]."""
    return (self.data.shape[0], *(self.data.shape[self._axis(i)] for i in range(len(self.order))))

  def open(self, layer: jax.Array, table: jax.Array | None = None) -> Held:
    """What a layer holds, not read yet; of a pool, by a table [b m] of its pages."""
    dtype, size = self.storage.dtype, self.storage.block
    return Held(self.data, self.scale, layer, table, self.order, dtype, size)

  def rounded(self, x: jax.Array) -> jax.Array:
    """x [b t ...] as it is read once it has been stored."""
    data, scale = self._encode(x)
    if scale is not None:
      data = data.astype(jnp.float32) * scale
    return data.astype(self.storage.dtype)

  def put(self, x: jax.Array, layer: jax.Array, slot: jax.Array | int) -> Slab:
    """With x [b t ...] in all rows of a layer, from `slot` on."""
    if self._split:
      slots = slot + jnp.arange(x.shape[1], dtype=jnp.int32)
      return self.scatter(x, layer, jnp.broadcast_to(slots, x.shape[:2]))

    def write(whole: jax.Array, new: jax.Array) -> jax.Array:
      starts = [layer, *(slot if i == 1 else 0 for i in self.order)]
      starts = [jnp.asarray(i, jnp.int32) for i in starts]
      return lax.dynamic_update_slice(whole, self._stored(new)[None], starts)

    return self._with(x, write)

  def scatter(self, x: jax.Array, layer: jax.Array, slots: jax.Array) -> Slab:
    """With x [b t ...] in the slots [b t] of each row, which differ; beyond the last: nowhere."""
    numbers = lax.ScatterDimensionNumbers(
      update_window_dims=tuple(range(2, x.ndim)),
      inserted_window_dims=(0, self._axis(1)),
      scatter_dims_to_operand_dims=(0, self._axis(1)),
      operand_batching_dims=(self._axis(0),),
      scatter_indices_batching_dims=(0,),
    )
    return self._scatter(x, (layer, slots), numbers)

  def scatter_pages(
    self, x: jax.Array, layer: jax.Array, pages: jax.Array, slots: jax.Array
  ) -> Slab:
    """With x [b t ...] in slots [b t] of pages [b t] of a pool; beyond the last page: nowhere."""
    whole = (0, self._axis(0), self._axis(1))
    numbers = lax.ScatterDimensionNumbers(
      update_window_dims=tuple(range(2, x.ndim)),
      inserted_window_dims=tuple(sorted(whole)),
      scatter_dims_to_operand_dims=whole,
    )
    return self._scatter(x, (layer, pages, slots), numbers)

  def row(self, slot: jax.Array | int) -> Slab:
    """One of the rows alone, of all layers."""
    cut = lambda x: lax.dynamic_slice_in_dim(x, slot, 1, self._axis(0))
    return jax.tree.map(cut, self)

  def with_row(self, other: Slab, slot: jax.Array | int) -> Slab:
    """With the only row of another slab, which may have fewer slots, in place of row `slot`."""

    def write(whole: jax.Array, new: jax.Array) -> jax.Array:
      starts = [0, *(slot if i == 0 else 0 for i in self.order)]
      return lax.dynamic_update_slice(whole, new, [jnp.asarray(i, jnp.int32) for i in starts])

    scale = None if self.scale is None else write(self.scale, other.scale)
    return dataclasses.replace(self, data=write(self.data, other.data), scale=scale)._placed()

  def places(self, layout: Layout) -> Slab:
    """Of shapes: the same, with where they stand."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      where = layout.sharding(self._names(x), x.shape, "a cache")
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(place, self)

  def _axis(self, logical: int) -> int:
    """Where the axis (0: b, 1: s, 2: g, 3: k) is stored."""
    return 1 + self.order.index(logical)

  def _names(self, x: Any) -> tuple[str | None, ...]:
    """The logical axes of x, data or scale: rows and heads as activations are."""
    names = (self.rows, self.rows and SLOTS, *_REST)
    axes = [None if x.shape[1 + at] == 1 else names[i] for at, i in enumerate(self.order)]
    return "layers", *axes

  @property
  def _split(self) -> tuple[str, ...]:
    """The mesh axes that split the slots of rows."""
    return layout.splits(SLOTS) if (layout := active()) and self.rows else ()

  def _placed(self) -> Slab:
    return jax.tree.map(lambda x: constrain(x, *self._names(x)), self)

  def _encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """x [b t ...] -> codes of the same shape, and their scales, with size 1 where one is shared."""
    if (quant := self.storage.quant) is None:
      return x.astype(self.storage.dtype), None
    dtype, most = _CODES[quant.format]
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(_shared(quant), keepdims=True) / most
    scale = jnp.where(scale == 0, 1.0, scale)  # of zeros alone, whose codes are zeros too
    codes = jnp.clip(x / scale, -most, most)
    return (codes if quant.format == "fp8" else jnp.round(codes)).astype(dtype), scale

  def _stored(self, x: jax.Array) -> jax.Array:
    """x [b t ...] in the order in which it is stored."""
    return lax.transpose(x, self.order)

  def _with(self, x: jax.Array, write: Any) -> Slab:
    """After write(whole, new) of the data and of the scales."""
    data, scale = self._encode(x)
    scale = None if scale is None else write(self.scale, scale)
    return dataclasses.replace(self, data=write(self.data, data), scale=scale)._placed()

  def _scatter(self, x: jax.Array, index: Sequence[Any], numbers: Any) -> Slab:
    shape = x.shape[:2]
    indices = jnp.stack([jnp.broadcast_to(i, shape).astype(jnp.int32) for i in index], -1)
    rest = [i for i in self.order if i > 1]

    def put(whole: jax.Array, new: jax.Array, indices: jax.Array) -> jax.Array:
      mode = lax.GatherScatterMode.FILL_OR_DROP
      return lax.scatter(whole, indices, new, numbers, mode=mode, unique_indices=True)

    def write(whole: jax.Array, new: jax.Array) -> jax.Array:
      return self._by_part(put, whole, lax.transpose(new, (0, 1, *rest)), indices)

    return self._with(x, write)

  def _by_part(self, put: Any, whole: jax.Array, new: jax.Array, indices: jax.Array) -> jax.Array:
    """put(whole, new, indices), by each device in those of its slots that the last index names."""
    layout, axes = active(), self._split
    if layout is None or not (axes or layout.explicit):
      return put(whole, new, indices)

    def own(whole: jax.Array, new: jax.Array, indices: jax.Array) -> jax.Array:
      first = lax.axis_index(axes) * whole.shape[self._axis(1)] if axes else 0
      return put(whole, new, indices.at[..., -1].add(-first))

    place = layout.sharding(self._names(whole), whole.shape).spec
    rows, *more = (place[self._axis(i)] for i in (0, *(i for i in self.order if i > 1)))
    parts = (place, PartitionSpec(rows, None, *more), PartitionSpec(rows))
    return by_device(own, parts, place)(whole, new, indices)


def _shared(quant: CacheQuantSpec) -> tuple[int, ...]:
  """The axes of (b s g k) along which numbers share a scale."""
  return (3,) if quant.axis == "dkv" else (2, 3)
