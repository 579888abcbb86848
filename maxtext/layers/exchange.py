"""What devices that have different experts of a layer send each other: rows there, and back again.

Parts of a program of one device. Letters: w devices, e experts of one, m rows of one, sorted by
expert, and r as many as may arrive.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from maxtext import sharding

NOWHERE = 2**30  # past the end of any array of rows


@dataclasses.dataclass(frozen=True)
class Peers:
  """Devices with different tokens, each of which has the next `each` experts: those along the mesh
  axes `names`. Where there are none, every device has all experts.

  A token chooses `active` experts. With `split` they have different rows of the batch, and else
  parts of the same rows. With `ragged` only those rows are sent that there are, and else blocks of
  as many as there may be.
  """

  names: tuple[str, ...]
  ways: int
  each: int
  active: int
  split: bool = True
  ragged: bool = False

  @classmethod
  def of(cls, experts: int, active: int) -> Peers:
    """Of the layout in use."""
    if (layout := sharding.active()) is None:
      return cls.none(experts, active)
    names = tuple(m for m in layout.splits("exp") if m in layout.token_axes)
    rows = tuple(m for m in names if m in layout.splits("activation_batch"))
    names = rows or names
    ways = math.prod(layout.mesh.shape[m] for m in names)
    return cls(names, ways, experts // ways, active, bool(rows), sharding.platform() != "cpu")

  @classmethod
  def none(cls, experts: int, active: int) -> Peers:
    """A device by itself."""
    return cls((), 1, experts, active)

  @property
  def room(self) -> int:
    """How many rows may arrive for every token of a device: as if all tokens chose its experts."""
    return self.ways * min(self.active, self.each)

  def counts(self, sizes: jax.Array) -> jax.Array:
    """How many rows of each expert, of all of them, this device has -> the same of every device
    [w all].
    """
    return jax.lax.all_gather(sizes, self.names) if self.names else sizes[None]

  def sizes(self, counts: jax.Array) -> jax.Array:
    """How many rows of each of its experts a device has once they are `sent` [e]."""
    return self._arriving(counts).sum(0)

  def sent(self, rows: jax.Array, counts: jax.Array) -> jax.Array:
    """[m ...] -> the rows of this device's experts [r ...], sorted by expert; zeros after them."""
    return _carried(self, False, rows, counts) if self.names else rows

  def returned(self, rows: jax.Array, counts: jax.Array) -> jax.Array:
    """[r ...] -> [m ...]: each where it was before it was `sent`; zeros where none was."""
    return _carried(self, True, rows, counts) if self.names else rows

  def swapped(self, x: jax.Array, dimension: int) -> jax.Array:
    """Of every device's own tokens and all experts (w e) -> of every device's tokens and the own
    experts, or back: the blocks w of a dimension change places with their devices.
    """
    if not self.names:
      return x
    return jax.lax.all_to_all(x, self.names, dimension, dimension, tiled=True)

  def gathered(self, x: jax.Array) -> jax.Array:
    """[b t ...] -> those of every device [b t w ...]."""
    return jax.lax.all_gather(x, self.names, axis=2) if self.names else x[:, :, None]

  def summed(self, x: jax.Array) -> jax.Array:
    """What each has for the tokens of all [b t w ...] -> its own tokens' sums [b t ...]."""
    if not self.names:
      return x[:, :, 0]
    return jax.lax.psum_scatter(x, self.names, scatter_dimension=2)

  def _each(self, counts: jax.Array) -> jax.Array:
    return counts.reshape(self.ways, self.ways, self.each)  # of a device, for one, of its experts

  def _arriving(self, counts: jax.Array) -> jax.Array:
    """From every device, of each own expert [w e]."""
    return self._each(counts)[:, jax.lax.axis_index(self.names) if self.names else 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _carried(peers: Peers, home: bool, rows: jax.Array, counts: jax.Array) -> jax.Array:
  """What is `sent`, or with `home` `returned`: each is the gradient of the other."""
  room = rows.shape[0] if home else rows.shape[0] // peers.active * peers.room
  arriving = peers._arriving(counts)
  begin = _before(arriving.sum(-1)) if peers.ragged else _blocks(peers, room)
  begin = begin[:, None] + _before(arriving, 1)
  order = _taken(arriving.T.flatten(), begin.T.flatten(), room)
  rows = _rows(rows, _inverse(order, room)) if home else rows
  travel = _ragged if peers.ragged else _padded
  rows = travel(peers, home, rows, peers._each(counts).sum(-1))
  return rows if home else _rows(rows, order)


def _padded(peers: Peers, home: bool, rows: jax.Array, each: jax.Array) -> jax.Array:
  """Rows to and from devices, each [w w] from one to another, in blocks of equal size."""
  room = rows.shape[0] if home else rows.shape[0] // peers.active * peers.room
  leaving = each[jax.lax.axis_index(peers.names)]
  place = _taken(leaving, _blocks(peers, room), room // peers.room * peers.active)
  rows = rows if home else _rows(rows, _inverse(place, room))
  blocks = rows.reshape(peers.ways, room // peers.ways, *rows.shape[1:])
  rows = jax.lax.all_to_all(blocks, peers.names, 0, 0).reshape(rows.shape)
  return _rows(rows, place) if home else rows


def _ragged(peers: Peers, home: bool, rows: jax.Array, each: jax.Array) -> jax.Array:
  """The same, one after another."""
  own, each = jax.lax.axis_index(peers.names), each.T if home else each
  tokens = rows.shape[0] // (peers.room if home else peers.active)
  space = jnp.zeros((tokens * (peers.active if home else peers.room), *rows.shape[1:]), rows.dtype)
  begin, sizes = _before(each[own]), each[own]
  return jax.lax.ragged_all_to_all(
    rows, space, begin, sizes, _before(each)[own], each[:, own], axis_name=peers.names
  )


def _blocks(peers: Peers, room: int) -> jax.Array:
  """Where each device's block begins."""
  return jnp.arange(peers.ways) * (room // peers.ways)


def _forward(peers: Peers, home: bool, rows: jax.Array, counts: jax.Array):
  return _carried(peers, home, rows, counts), counts


def _backward(peers: Peers, home: bool, counts: jax.Array, g: jax.Array):
  return _carried(peers, not home, g, counts), None


_carried.defvjp(_forward, _backward)


def _before(sizes: jax.Array, axis: int = 0) -> jax.Array:
  """The sums of those before each."""
  return jnp.cumsum(sizes, axis) - sizes


def _taken(sizes: jax.Array, begin: jax.Array, count: int) -> jax.Array:
  """Which row is taken to each of `count` places, where parts of these sizes, which begin there,
  come one after another; NOWHERE after them.
  """
  ends, at = jnp.cumsum(sizes), jnp.arange(count)
  part = jnp.minimum(jnp.searchsorted(ends, at, side="right"), sizes.shape[0] - 1)
  return jnp.where(at < ends[-1], (begin + sizes - ends)[part] + at, NOWHERE)


def _inverse(index: jax.Array, count: int) -> jax.Array:
  """Which place takes each of `count` rows; NOWHERE for a row that none takes."""
  return jnp.full(count, NOWHERE).at[index].set(jnp.arange(index.shape[0]), mode="drop")


def _rows(rows: jax.Array, index: jax.Array) -> jax.Array:
  """Those rows; zeros for NOWHERE."""
  return rows.at[index].get(mode="fill", fill_value=0)
