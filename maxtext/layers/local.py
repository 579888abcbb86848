"""What each device computes of its own tokens, and the sums over devices that this takes.

For what XLA's partitioner cannot split, such as ordering tokens by expert: a program of one device,
given its part of each array. Arrays over tokens begin with [b t].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from maxtext import collectives, sharding

Arrays = tuple[jax.Array, ...]
Axes = tuple[str | None, ...]
WIDE = {"mlp": "activation_mlp"}  # what stays split, of parameters and of arrays over tokens


class Weight:
  """A parameter of which a device has its part, as the device's program takes it."""

  def __init__(self, part: jax.Array, dtype: jnp.dtype, place: _Place | None, number: int):
    self._part, self._dtype, self._place, self._number = part, dtype, place, number

  def product(
    self,
    function: Callable[..., jax.Array],
    *rows: jax.Array,
    beside: Sequence[jax.Array] = (),
  ) -> Arrays:
    """What function(whole parameter, *rows) makes, and those `beside` it as they are.

    On the way back the gradients of rows and of those beside wait until the parameter's was added
    up and split: no two parameters' sums over a device's tokens are there at once.
    """
    place = self._place
    if place is None:
      return function(self._part, *rows), *beside

    @jax.custom_vjp
    def made(part: jax.Array, rows: Arrays, beside: Arrays) -> Arrays:
      return function(self._joined(part), *rows), *beside

    def backward(saved: tuple[jax.Array, Arrays], grads: Arrays) -> tuple:
      part, rows = saved
      whole = self._joined(part)
      (dwhole,) = jax.vjp(lambda whole: function(whole, *rows), whole)[1](grads[0])
      with sharding.use(place.layout, apart=True):
        dpart = place.scattered(dwhole, self._number)
        dpart, g, *others = collectives.in_turn(dpart, *grads)
      return dpart, jax.vjp(functools.partial(function, whole), *rows)[1](g), tuple(others)

    made.defvjp(lambda part, rows, beside: (made(part, rows, beside), (part, rows)), backward)
    return made(self._part, rows, tuple(beside))

  @property
  def whole(self) -> jax.Array:
    """The parameter by itself, for what is as small as a bias."""
    place = self._place
    if place is None:
      return self._part

    def backward(_: None, g: jax.Array) -> tuple[jax.Array]:
      with sharding.use(place.layout, apart=True):
        return (place.scattered(g, self._number),)

    entered = jax.custom_vjp(self._joined)
    entered.defvjp(lambda part: (self._joined(part), None), backward)
    return entered(self._part)

  def _joined(self, part: jax.Array) -> jax.Array:
    """Of what is rounded, and of its dtype again."""
    assert self._place is not None
    with sharding.use(self._place.layout, apart=True):
      return self._place.joined(part.astype(self._dtype), self._number).astype(part.dtype)


Weights = tuple[Weight, ...]


@dataclasses.dataclass(frozen=True)
class Work:
  """A program of one device, function(tokens, weights) -> tokens, and the logical axes of its
  arrays: over tokens those after [b t], of parameters all.

  Of all these axes only those in WIDE stay split, and those of experts over the mesh axes of
  `peers`: the program has those of one device then, and of its tokens sends what others need. What
  is not split of the outputs is a part of a sum, and is added up; so is the gradient of such an
  input. The second dimension of the tokens is split as their length is, or over the mesh axes
  `second`. Parameters are rounded to `dtype`, and their gradients summed in float32.
  """

  function: Callable[[Arrays, Weights], Arrays]
  inputs: tuple[Axes, ...]
  outputs: tuple[Axes, ...]
  params: tuple[Axes, ...] = ()
  peers: tuple[str, ...] = ()
  second: tuple[str, ...] | None = None
  dtype: jnp.dtype = jnp.dtype("float32")

  def on_one(self, place: _Place | None, tokens: Arrays, params: Arrays) -> Arrays:
    """What the program makes where its arrays are, parts of sums among them."""
    weights = (Weight(p, self.dtype, place, i) for i, p in enumerate(params))
    with sharding.use(None):
      return self.function(tokens, tuple(weights))


def run(work: Work, tokens: Sequence[jax.Array], params: Sequence[nnx.Param] = ()) -> Arrays:
  """The outputs, on every device those of its own tokens."""
  axes = tuple(p.get_metadata()["axes"] for p in params)
  return _run(dataclasses.replace(work, params=axes), tuple(tokens), tuple(p[...] for p in params))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(work: Work, tokens: Arrays, params: Arrays) -> Arrays:
  params = tuple(p.astype(work.dtype) for p in params)
  if (place := _Place.of(work)) is None:
    return work.on_one(None, tokens, params)

  def one(tokens: Arrays, params: Arrays) -> Arrays:
    return place.added(work.on_one(place, tokens, params), work.outputs)

  inputs = tuple(map(place.tokens, work.inputs))
  return sharding.by_device(one, (inputs, place.params), tuple(map(place.tokens, work.outputs)))(
    tokens, params
  )


def _forward(work: Work, tokens: Arrays, params: Arrays):
  return _run(work, tokens, params), (tokens, params)


def _backward(work: Work, saved: tuple[Arrays, Arrays], g: Arrays):
  tokens, params = saved
  moving = [jnp.issubdtype(x.dtype, jnp.inexact) for x in tokens]
  axes = tuple(a for a, moves in zip(work.inputs, moving) if moves)
  place = _Place.of(work)

  def one(tokens: Arrays, params: Arrays, g: Arrays) -> tuple[Arrays, Arrays]:
    def function(moved: Arrays, params: Arrays) -> Arrays:
      left = iter(moved)
      given = tuple(next(left) if m else x for x, m in zip(tokens, moving))
      return work.on_one(place, given, params)

    moved = tuple(x for x, moves in zip(tokens, moving) if moves)
    # the program rounds them again, and gradients stay in float32
    _, pull = jax.vjp(function, moved, tuple(p.astype(jnp.float32) for p in params))
    with sharding.use(None):
      dtokens, dparams = pull(g)
    return dtokens if place is None else place.added(dtokens, axes), dparams

  if place is not None:
    spots = tuple(map(place.tokens, work.inputs))
    one = sharding.by_device(
      one,
      (spots, place.params, tuple(map(place.tokens, work.outputs))),
      (tuple(map(place.tokens, axes)), place.params),
    )
  dtokens, dparams = one(tokens, tuple(p.astype(work.dtype) for p in params), g)
  left = iter(dtokens)
  dparams = tuple(
    sharding.constrain(d, *a).astype(p.dtype) for d, a, p in zip(dparams, work.params, params)
  )
  gradient = lambda x, moves: sharding.alike(next(left), x) if moves else None
  return tuple(map(gradient, tokens, moving)), dparams


_run.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Place:
  """How the arrays of a program are split over the mesh: `rows` and `second` split tokens, `wide`
  and the experts of `peers` what stays split besides; `new` are the axes over which each parameter
  is gathered, by dimension.
  """

  layout: sharding.Layout
  rows: tuple[str, ...]
  second: tuple[str, ...]
  wide: tuple[str, ...]
  peers: tuple[str, ...]
  params: tuple[PartitionSpec, ...]
  new: tuple[tuple[tuple[str, ...], ...], ...]

  @classmethod
  def of(cls, work: Work) -> _Place | None:
    """None where there is nothing to split over."""
    layout = sharding.active()
    if layout is None or layout.mesh.size == 1:
      return None
    names = {name for axes in (*work.inputs, *work.outputs) for name in axes}
    wide = _over(layout, *(name for name in WIDE.values() if name in names))
    rows = layout.splits("activation_batch")
    second = layout.splits(sharding.LENGTH) if work.second is None else work.second
    tokens = {*rows, *second} - {*work.peers}
    new, specs = [], []
    for axes in work.params:
      kept = [wide if name in WIDE else work.peers if name == "exp" else () for name in axes]
      more = [tuple(m for m in _over(layout, name) if m in tokens) for name in axes]
      new.append(tuple(more))
      specs.append(PartitionSpec(*(old + add or None for old, add in zip(kept, more))))
    return cls(layout, rows, second, wide, work.peers, tuple(specs), tuple(new))

  def tokens(self, axes: Axes) -> PartitionSpec:
    """Of an array over tokens with these axes after [b t]."""
    rest = (self.wide or None if name in WIDE.values() else None for name in axes)
    return PartitionSpec(self.rows or None, self.second or None, *rest)

  def added(self, arrays: Arrays, axes: Sequence[Axes]) -> Arrays:
    """The sums of those arrays that are not split, over what else is."""
    if not self.wide:
      return arrays
    split = [any(name in WIDE.values() for name in a) for a in axes]
    return tuple(x if s else jax.lax.psum(x, self.wide) for x, s in zip(arrays, split))

  def joined(self, part: jax.Array, number: int) -> jax.Array:
    """The parameter of this number, gathered over the mesh axes that split tokens."""
    for i, names in enumerate(self.new[number]):
      part = collectives.join(part, names, i) if names else part
    return part

  def scattered(self, grad: jax.Array, number: int) -> jax.Array:
    """The sum of a parameter's gradients over all tokens, split as `joined` found it."""
    new = self.new[number]
    for i, names in enumerate(new):
      grad = collectives.add_and_split(grad, names, i) if names else grad
    done = {*self.peers, *(m for names in new for m in names)}
    rest = tuple(m for m in (*self.rows, *self.second) if m not in done)
    return jax.lax.psum(grad, rest) if rest else grad


def _over(layout: sharding.Layout, *names: str | None) -> tuple[str, ...]:
  """The mesh axes that split these logical axes."""
  table, sizes = layout.rules.table, layout.mesh.shape
  return tuple(m for name in names if name for m in table[name] if sizes.get(m, 1) > 1)
