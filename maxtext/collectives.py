"""What the devices of a mesh send each other for parameters that are split: gathered where they are
used, and their gradients added up where they stand.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from maxtext import sharding

TPU = ("tpu",)  # platforms whose compiler is asked as the TPU's has to be
ROWS, WIDE = 8, 2**16  # of a tile of a TPU's memory; columns of what is as wide as a vocabulary


def gather(w: jax.Array, axes: sharding.Axes) -> jax.Array:
  """A parameter as a contraction uses it: not split over the axes that split the batch.

  Left to itself, XLA's partitioner may instead move the activations over those axes, and for small
  batches computes a wrong product when it does (tests/test_partitioner.py keeps the case).
  """
  if (layout := sharding.active()) is None or layout.mesh.size == 1:
    return w
  kept = layout.gathered(axes, w.shape).spec
  new, place = layout.shares(axes, w.shape)

  def joined(w: jax.Array) -> jax.Array:
    for i, names in enumerate(new):
      w = join(w, names, i) if names else w
    return w

  if any(new):
    w = sharding.by_device(joined, place, kept)(w)
  return sharding.place(w, kept)


def whole(w: jax.Array, axes: sharding.Axes) -> jax.Array:
  """As `gather`, of a parameter that is added to activations; how is left to the compiler."""
  layout = sharding.active()
  if layout is None or layout.mesh.size == 1:
    return w
  return sharding.place(w, layout.gathered(axes, w.shape).spec)


def partial(equation: str, axes: sharding.Axes, *rows: jax.Array, precision: Any) -> jax.Array:
  """The float32 einsum of rows [b t ...] for every share of the tokens by itself -> [ways ...],
  each where they are.

  The einsum sums over tokens, to the shape of a parameter with these axes; `scatter` adds the
  shares up.
  """
  layout = sharding.active()
  product = functools.partial(
    sharding.einsum, equation, precision=precision, preferred_element_type=jnp.float32
  )
  if layout is None or not (layout.explicit or layout.token_axes):
    return product(*rows)[None]
  tokens = layout.token_axes or None
  if tokens is None:
    shares = product(*rows)[None]
  else:

    def one(*rows: jax.Array) -> jax.Array:
      with sharding.use(None):
        return product(*rows)[None]

    if layout.explicit:  # types of parts over some axes forget the others
      inputs, out = equation.split("->")
      split = sharding.shares(out, zip(inputs.split(","), rows))
      kept = lambda letters: [sharding.entry_of(split[letter]) for letter in letters]
      specs = [PartitionSpec(*layout.tokens, *kept(each[2:])) for each in inputs.split(",")]
      run = sharding.by_device(one, tuple(specs), PartitionSpec(tokens, *kept(out)))
    else:  # over the other axes it stays one program
      over = (*tokens, *layout.around)
      run = sharding.by_device(one, layout.tokens, PartitionSpec(tokens), over)
    shares = run(*rows)
  return sharding.place(
    shares, PartitionSpec(tokens, *layout.gathered(axes, shares.shape[1:]).spec)
  )


def scatter(shares: jax.Array, axes: sharding.Axes) -> jax.Array:
  """The sum of the `partial` products of a parameter with these axes, split as the parameter is.

  Of what it is asked to add up and split, XLA's partitioner would make the whole sum on every
  device first: here no device receives more than its own part.
  """
  return joined(split(shares, axes)[None], axes, 0)


def in_turn(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """All, there at the same time: what is made of one of them waits for the others, and on the way
  back likewise. For the TPU's compiler, which else makes all shares of gradients before it adds up
  and splits any.

  Not where hidden activations are split: shares are smaller there, and what comes back are parts of
  sums, which are better added up before they are sent.
  """
  layout = sharding.active()
  if layout is None or not layout.token_axes or sharding.platform() not in TPU:
    return arrays
  return arrays if layout.ways("activation_mlp") > 1 else jax.lax.optimization_barrier(arrays)


def split(shares: jax.Array, axes: sharding.Axes) -> jax.Array:
  """Of the sum of `partial` products each device's own part -> [ways ...]; the shares are left of
  devices that have the same part, which `joined` adds up.
  """
  layout, shape = sharding.active(), shares.shape[1:]
  if layout is None or not layout.token_axes:
    return shares
  new, place, rest = _parts(layout, axes, shape)

  def add(shares: jax.Array) -> jax.Array:
    part = shares[0]
    for i, names in enumerate(new):
      part = add_and_split(part, names, i) if names else part
    return part[None]

  given = PartitionSpec(layout.token_axes, *layout.gathered(axes, shape).spec)
  return sharding.by_device(add, given, PartitionSpec(sharding.entry_of(rest), *place))(shares)


def joined(pieces: jax.Array, axes: sharding.Axes, dimension: int) -> jax.Array:
  """What `split` gives, or a sum of such -> the parameter's gradient; of a dimension every device's
  part comes in pieces [pieces ways ...].
  """
  layout = sharding.active()

  def join(pieces: jax.Array) -> jax.Array:
    x = jnp.moveaxis(pieces[:, 0], 0, dimension)
    return x.reshape(*x.shape[:dimension], -1, *x.shape[dimension + 2 :])

  if layout is None or not layout.token_axes:
    return sharding.constrain(join(pieces), *axes)
  _, place, rest = _parts(layout, axes, pieces.shape[2:])
  add = lambda pieces: jax.lax.psum(join(pieces), rest) if rest else join(pieces)
  given = PartitionSpec(None, sharding.entry_of(rest), *place)
  return sharding.constrain(sharding.by_device(add, given, place)(pieces), *axes)


def nothing(axes: sharding.Axes, shape: tuple[int, ...]) -> jax.Array:
  """What `split` gives where there are no tokens: zeros, of a parameter of this shape."""
  layout = sharding.active()
  if layout is None or not (layout.explicit or layout.token_axes):
    return jnp.zeros((1, *shape), jnp.float32)
  _, place, rest = _parts(layout, axes, shape)
  zeros = jnp.zeros((math.prod(layout.mesh.shape[m] for m in rest), *shape), jnp.float32)
  return sharding.place(zeros, PartitionSpec(sharding.entry_of(rest), *place))


def ways(axes: sharding.Axes, shape: tuple[int, ...], dimension: int) -> int:
  """Among how many devices a dimension of a parameter is divided, if `split` divides it at all."""
  layout = sharding.active()
  if layout is None:
    return 1
  new, place, _ = _parts(layout, axes, shape)
  names = sharding.names_of(place[dimension]) if new[dimension] else ()
  return math.prod(layout.mesh.shape[m] for m in names)


def _parts(
  layout: sharding.Layout, axes: sharding.Axes, shape: tuple[int, ...]
) -> tuple[list[tuple[str, ...]], PartitionSpec, tuple[str, ...]]:
  """As `Layout.shares`, and the mesh axes that split tokens but not the parameter."""
  new, place = layout.shares(axes, shape)
  return new, place, tuple(m for m in layout.token_axes if not any(m in names for names in new))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def deal(w: jax.Array, axes: sharding.Axes, name: str, stages: int, repeats: int) -> jax.Array:
  """A stacked parameter [(s r n) ...] of which devices along mesh axis `name` have consecutive
  layers, and whose other axes these are -> [s r n ...], of [(r s n) ...]: each has its own of every
  repeat.

  Left to itself, XLA's partitioner gathers all layers where stages do not divide the repeats.
  """
  return _dealt(w, axes, name, (stages, repeats), True)


def _dealt(
  w: jax.Array, axes: sharding.Axes, name: str, sizes: tuple[int, int], there: bool
) -> jax.Array:
  """Blocks of layers to their stages, or back, in as many rounds as there are repeats: in each,
  every device sends one and receives one.
  """
  layout, (stages, repeats) = sharding.active(), sizes
  assert layout is not None
  rest = w.shape[1:] if there else w.shape[3:]
  if repeats == 1:
    return w.reshape(stages, 1, -1, *rest) if there else w.reshape(-1, *rest)
  own, rounds = np.arange(stages), []
  for i in range(repeats):
    block = (i + own // (stages // math.gcd(stages, repeats))) % repeats  # that each one sends
    to, at = (own * repeats + block) % stages, (own * repeats + block) // stages
    place = at[np.argsort(to)]  # of what it receives
    rounds.append(
      (block, place, list(zip(own, to))) if there else (place, block, list(zip(to, own)))
    )

  def local(w: jax.Array) -> jax.Array:
    blocks = w.reshape(repeats, -1, *w.shape[1 if there else 3 :])
    here, out = jax.lax.axis_index(name), jnp.zeros_like(blocks)
    for leaving, coming, pairs in rounds:
      sent = jax.lax.ppermute(blocks[jnp.asarray(leaving)[here]], name, pairs)
      out = out.at[jnp.asarray(coming)[here]].set(sent)
    return out[None] if there else out.reshape(-1, *out.shape[2:])

  split = layout.sharding(axes, rest).spec
  specs = PartitionSpec(name, *split), PartitionSpec(name, None, None, *split)
  inputs, outputs = specs if there else specs[::-1]
  return sharding.by_device(local, inputs, outputs)(w)


deal.defvjp(
  lambda w, *how: (deal(w, *how), None),
  lambda axes, name, stages, repeats, _, g: (_dealt(g, axes, name, (stages, repeats), False),),
)


def take_rows(w: jax.Array, axes: sharding.Axes, rows: jax.Array) -> jax.Array:
  """Rows [b t] of a table [v d] -> [b t d]. The rows that are asked for travel, not the table."""
  layout = sharding.active()
  if layout is None or not (layout.token_axes or layout.explicit) or not layout.even(rows):
    return gather(w, axes)[rows]
  (joined, moved), place = layout.shares(axes, w.shape)
  split, kept = layout.gathered(axes, w.shape).spec

  def take(w: jax.Array, rows: jax.Array) -> jax.Array:
    w = join(w, joined, 0) if joined else w
    rows = jax.lax.all_gather(rows, moved) if moved else rows
    y = w.at[_own(rows, w.shape[0], sharding.names_of(split))].get(mode="fill", fill_value=0)
    y = jax.lax.psum(y, sharding.names_of(split)) if split else y
    if not moved:
      return y
    y = jnp.moveaxis(jax.lax.all_to_all(y, moved, 0, 0), 0, 2)  # [b t ways d/ways]
    return y.reshape(*y.shape[:2], y.shape[2] * y.shape[3])

  return sharding.by_device(take, (place, layout.tokens), PartitionSpec(*layout.tokens, kept))(
    w, rows
  )


def add_rows(
  g: jax.Array, axes: sharding.Axes, rows: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """g [b t d] added up in float32 in the rows [b t] of a table [v d] that is otherwise zero."""
  layout = sharding.active()
  if layout is None or not (layout.token_axes or layout.explicit):
    return sharding.constrain(
      jnp.zeros(shape, jnp.float32).at[rows].add(g.astype(jnp.float32)), *axes
    )
  (joined, moved), place = layout.shares(axes, shape)
  split, kept = layout.gathered(axes, shape).spec
  rest = tuple(m for m in layout.token_axes if m not in (*joined, *moved))
  height = shape[0] // math.prod(layout.mesh.shape[m] for m in sharding.names_of(split))

  def add(g: jax.Array, rows: jax.Array) -> jax.Array:
    if moved:
      ways = jax.lax.axis_size(moved)
      g = g.reshape(*g.shape[:2], ways, g.shape[2] // ways)
      g = jax.lax.all_to_all(jnp.moveaxis(g, 2, 0), moved, 0, 0)
      rows = jax.lax.all_gather(rows, moved)
    total = jnp.zeros((height, g.shape[-1]), jnp.float32)
    own = _own(rows, height, sharding.names_of(split))
    total = total.at[own].add(g.astype(jnp.float32), mode="drop")
    total = add_and_split(total, joined, 0) if joined else total
    return jax.lax.psum(total, rest) if rest else total

  total = sharding.by_device(add, (PartitionSpec(*layout.tokens, kept), layout.tokens), place)(
    g, rows
  )
  return sharding.constrain(total, *axes)


def _own(rows: jax.Array, height: int, names: tuple[str, ...]) -> jax.Array:
  """Where rows of a table stand in this device's `height` of them; `height` for those of others."""
  at = rows - jax.lax.axis_index(names) * height if names else rows
  return jnp.where((at < 0) | (at >= height), height, at)


def join(x: jax.Array, names: tuple[str, ...], dimension: int) -> jax.Array:
  """All shares of x over these mesh axes, side by side along a dimension.

  Off TPU what is sent are whole blocks: along any dimension but the first, XLA would transpose
  every element before and after. The TPU's compiler gathers along any.
  """
  if sharding.platform() in TPU:
    for axes, rings in reversed(_steps(names, "gather")):
      if _uneven(x, dimension, 1):
        x = _one_below_the_other(jax.lax.all_gather(x, axes, axis_index_groups=rings))
      else:
        x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True, axis_index_groups=rings)
    return x
  blocks = jnp.moveaxis(jax.lax.all_gather(x, names), 0, dimension)
  size = blocks.shape[dimension] * x.shape[dimension]
  return blocks.reshape(*x.shape[:dimension], size, *x.shape[dimension + 1 :])


def add_and_split(x: jax.Array, names: tuple[str, ...], dimension: int) -> jax.Array:
  """Each device's share, along a dimension, of the sum of x over these mesh axes.

  Off TPU, and for matrices, whole blocks are sent, as in `join`. The TPU's compiler scatters what
  has more dimensions along any; of its blocks, as of matrices along a dimension, it would make the
  whole sum on every device first.
  """
  steps = _steps(names, "add")
  if sharding.platform() in TPU and x.ndim > 2:
    for axes, rings in steps:
      x = jax.lax.psum_scatter(
        x, axes, scatter_dimension=dimension, tiled=True, axis_index_groups=rings
      )
    return x
  ways = jax.lax.axis_size(names)
  size = x.shape[dimension] // ways
  if sharding.platform() in TPU and _uneven(x, dimension, ways):
    blocks = _in_tiles(x, ways)
  else:
    blocks = x.reshape(*x.shape[:dimension], ways, size, *x.shape[dimension + 1 :])
    blocks = jnp.moveaxis(blocks, dimension, 0)
  for axes, rings in steps:
    among = len(rings[0]) if rings else jax.lax.axis_size(axes)
    blocks = blocks.reshape(among, -1, *blocks.shape[1:])
    blocks = jax.lax.psum_scatter(blocks, axes, axis_index_groups=rings)
  return blocks[0] if dimension else blocks[0, :size]


def _uneven(x: jax.Array, dimension: int, ways: int) -> bool:
  """Whether x is as wide as a vocabulary and its rows, so divided, fill no whole tiles of a TPU.

  Its compiler would write out every step of laying them out anew, half of a large model's program,
  and of a sum of such make the whole on every device. What is narrower it lays out in a loop.
  """
  wide = x.ndim == 2 and dimension == 0 and x.shape[1] >= WIDE
  return wide and x.shape[0] // ways % ROWS > 0


def _one_below_the_other(parts: jax.Array) -> jax.Array:
  """[ways rows v] -> [(ways rows) v]."""
  ways, rows, width = parts.shape
  put = lambda i, x: jax.lax.dynamic_update_slice(x, parts[i], (i * rows, 0))
  return jax.lax.fori_loop(0, ways, put, jnp.zeros((ways * rows, width), parts.dtype))


def _in_tiles(x: jax.Array, ways: int) -> jax.Array:
  """[(ways rows) v] -> [ways rows v], rows of zeros below each up to whole tiles."""
  rows, width = x.shape[0] // ways, x.shape[1]
  take = lambda i: jax.lax.dynamic_slice(x, (i * rows, 0), (rows, width))
  put = lambda i, blocks: jax.lax.dynamic_update_slice(blocks, take(i)[None], (i, 0, 0))
  return jax.lax.fori_loop(0, ways, put, jnp.zeros((ways, rows + -rows % ROWS, width), x.dtype))


def _steps(
  names: tuple[str, ...], purpose: Literal["add", "gather"]
) -> list[tuple[tuple[str, ...], list[list[int]] | None]]:
  """The mesh axes, and groups of devices along them, among which to add up and split one after the
  other; or to gather, in the other order.

  Of a sum over all chips of a slice the TPU's compiler makes the whole on each of them before it
  splits it, and on a torus of three dimensions it gathers by such a sum too: that sends twice as
  much, and nothing is computed meanwhile. There it goes in two steps, the one that sends more over
  planes of the torus, the other over lines.
  """
  layout, ways = sharding.active(), jax.lax.axis_size(names)
  if layout is None or sharding.platform() not in TPU:
    return [(names, None)]
  chips, line, dimensions = torus(layout.mesh)
  if ways != chips or (purpose == "gather" and dimensions < 3):
    return [(names, None)]
  if len(names) > 1:
    return [((name,), None) for name in names]
  if ways == line or ways % line:
    return [(names, None)]
  at = np.arange(ways).reshape(-1, line)
  return [(names, at.T.tolist()), (names, at.tolist())]


@functools.cache
def torus(mesh: Mesh) -> tuple[int, int, int]:
  """Of a slice of TPUs: its chips, how many of them stand in a line one after the other as the
  mesh counts, and the dimensions in which the slice extends.
  """
  devices, number = list(mesh.devices.flat), lambda device: getattr(device, "slice_index", 0)
  devices = [device for device in devices if number(device) == number(devices[0])]
  places = np.array([device.coords for device in devices])
  moved = np.maximum.accumulate(places != places[0], axis=0).sum(1)  # dimensions seen so far
  return len(devices), int((moved < 2).sum()), int(moved[-1])
