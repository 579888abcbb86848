"""Rows that devices send to the experts of others: all arrive, and all come back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from maxtext.layers.exchange import Peers

EXPERTS, TOKENS, ACTIVE, WIDTH = 8, 6, 3, 5


def over(ways, function, *arrays):
  """function on every device's part of the arrays [ways ...], along an axis 'expert'."""
  mesh = Mesh(np.array(jax.devices()[:ways]), ("expert",), axis_types=(AxisType.Auto,))
  one = lambda *parts: jax.tree.map(lambda a: a[None], function(*(p[0] for p in parts)))
  spec = PartitionSpec("expert")
  mapped = jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return jax.tree.map(np.asarray, jax.jit(mapped)(*arrays))


def drawn(ways, kind):
  """Rows [ways m d], each with its number, and how many of each expert's every device has."""
  random = np.random.default_rng(ways)
  sizes = np.zeros((ways, EXPERTS), np.int32)
  for device in range(ways):
    for _ in range(TOKENS - device % 2):  # some have padding besides
      few = {"one": [5], "few": [5, 6, 7], "all": range(EXPERTS)}[kind]
      chosen = random.choice(few, min(ACTIVE, len(few)), replace=False)
      sizes[device, chosen] += 1
  rows = np.arange(1, ways * TOKENS * ACTIVE * WIDTH + 1, dtype=np.float32)
  return rows.reshape(ways, TOKENS * ACTIVE, WIDTH), sizes


def peers(ways, ragged=False):
  return Peers(("expert",), ways, EXPERTS // ways, ACTIVE, ragged=ragged)


def emulated(rows, space, begin, sizes, there, come, *, axis_name):
  """What the documentation of jax.lax.ragged_all_to_all says, which no CPU has."""
  rows, begin, sizes, there = (
    jax.lax.all_gather(a, axis_name[0]) for a in (rows, begin, sizes, there)
  )
  own = jax.lax.axis_index(axis_name)
  for source in range(rows.shape[0]):
    i = jnp.arange(rows.shape[1])
    at = jnp.where(i < sizes[source, own], there[source, own] + i, len(space))
    space = space.at[at].set(rows[source, (begin[source, own] + i) % len(i)], mode="drop")
  return jnp.where((come == sizes[:, own]).all(), space, jnp.nan)


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("kind", ["one", "few", "all"])
@pytest.mark.parametrize("ways", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_every_row_reaches_its_expert_and_comes_back(monkeypatch, ways, kind, ragged):
  """Also where all tokens choose the same expert."""
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
  side = peers(ways, ragged)

  def there_and_back(rows, sizes):
    counts = side.counts(sizes)
    sent = side.sent(rows, counts)
    return sent, side.sizes(counts), side.returned(sent, counts)

  rows, sizes = drawn(ways, kind)
  sent, arrived, back = over(ways, there_and_back, rows, sizes)
  ends = np.cumsum(sizes, 1)
  for device in range(ways):
    want, own = [], range(device * side.each, (device + 1) * side.each)
    for expert in own:
      for source in range(ways):
        end = ends[source, expert]
        want.append(rows[source, end - sizes[source, expert] : end])
    want = np.concatenate(want)
    np.testing.assert_array_equal(arrived[device], sizes[:, own.start : own.stop].sum(0))
    np.testing.assert_array_equal(sent[device, : len(want)], want)
    np.testing.assert_array_equal(sent[device, len(want) :], 0)
    count = sizes[device].sum()
    np.testing.assert_array_equal(back[device, :count], rows[device, :count])
    np.testing.assert_array_equal(back[device, count:], 0)


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_a_gradient_takes_the_way_back(monkeypatch, ragged):
  """The sum of products with any weights has these weights as its gradient, at home and away."""
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
  side, (rows, sizes) = peers(2, ragged), drawn(2, "few")

  def gradients(rows, sizes):
    counts = side.counts(sizes)
    weights = jnp.sin(rows)
    away, back = (functools.partial(f, counts=counts) for f in (side.sent, side.returned))
    of_sent = jax.grad(lambda rows: (away(rows) * away(weights)).sum())(rows)
    of_returned = jax.grad(lambda sent: (back(sent) * weights).sum())(away(rows))
    return of_sent, of_returned, back(away(weights)), away(weights)

  of_sent, of_returned, home, abroad = over(2, gradients, rows, sizes)
  np.testing.assert_array_equal(of_sent, home)
  np.testing.assert_array_equal(of_returned, abroad)
