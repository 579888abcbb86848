"""No silent cell: over all features, every kernel equals the reference, or refuses in words.

A cell is a combination of features. How many cells were tried, refused and compared for each kernel
is printed: with `pytest -s`, and at the end of a slow run. The kernels of hardware that is not here
run by what stands for it: the TPU's by the interpreter of Pallas, the mask of the GPU's by XLA.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext import kernels
from maxtext.errors import ConfigError
from maxtext.kernels import Scores, attend, blockwise, cudnn, splash
from maxtext.masks import Mask

FEATURES = {
  "heads": [(4, 4), (4, 2), (4, 1)],
  "structure": [{}, {"window": 7}, {"chunk": 9}, {"block": 6}, {"causal": False}],
  "marks": ["plain", "packed", "padded", "spans"],
  "soft_cap": [None, 2.0],
  "sink": [False, True],
  "dropout": [0.0, 0.3],
  "head_dim": [16, 5],
  "length": [32, 37],
  "dtype": ["float32", "bfloat16"],
}
CELLS = [dict(zip(FEATURES, values)) for values in itertools.product(*FEATURES.values())]
HASTY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
# Of so many cells one is tried: a number without a common factor with any feature's choices.
STRIDES = {"blockwise": 97, "ragged": 113, "cudnn_flash": 113, "flash": 331}
PARTS = 4
SLOW = {"blockwise": 7, "ragged": 11, "cudnn_flash": 11, "flash": 37}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
  monkeypatch.setattr(blockwise, "_LEAST", 8)
  monkeypatch.setattr(blockwise, "_MOST", 8)
  monkeypatch.setattr(splash, "INTERPRET", True)
  mapping = cudnn.attention
  monkeypatch.setattr(cudnn, "attention", lambda _, *case: mapping("xla", *case))
  monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
  monkeypatch.setattr(cudnn, "planned", lambda: True)


def make(cell):
  """q, k, v, a cotangent, mask, scores, sink and seed of a cell."""
  length, (heads, groups) = cell["length"], cell["heads"]
  random = np.random.default_rng(length)
  sizes = [heads, groups, groups, heads]
  arrays = [
    jnp.asarray(random.normal(size=(2, length, n, cell["head_dim"])), cell["dtype"]) for n in sizes
  ]
  cut = length // 3
  positions = np.stack([np.arange(length)] * 2)
  segments = np.ones((2, length), int)
  if cell["marks"] == "packed":
    positions[1] = [*range(cut), *range(length - cut)]
    segments[1] = [1] * cut + [2] * (length - cut)
  if cell["marks"] == "padded":
    segments[0, -cut:] = 0
  spans = (np.arange(length) // 10 % 2) * np.ones((2, 1), int) if cell["marks"] == "spans" else None
  marks = [None if m is None else jnp.asarray(m) for m in (positions, segments, spans)]
  if cell["marks"] == "plain":
    marks[1] = None
  mask = Mask.of(*marks, ordered=True).narrow(**cell["structure"])
  scores = Scores(0.3, cell["soft_cap"], dropout=cell["dropout"])
  sink = jnp.asarray(random.normal(size=heads), jnp.float32) if cell["sink"] else None
  seed = jnp.array([3, 5], jnp.uint32) if cell["dropout"] else None
  return arrays, mask, scores, sink, seed


def outcome(name, cell):
  """The result, and where there is a gradient those by q, k, v and the sink."""
  (q, k, v, cotangent), mask, scores, sink, seed = make(cell)
  traced = (q, k, v) if sink is None else (q, k, v, sink)

  def run(q, k, v, sink=None):
    return attend(name, q, k, v, mask, scores, sink, seed)

  @functools.partial(jax.jit, compiler_options=HASTY)
  def both(*traced):
    if name == "ragged":
      return (run(*traced),)
    y, back = jax.vjp(run, *traced)
    return y, *back(cotangent)

  return both(*traced)


def tally(name, cells):
  """(tried, refused, compared) over cells; fails at one that is silently wrong."""
  tried = refused = 0
  for cell in cells:
    tried += 1
    try:
      found = outcome(name, cell)
    except ConfigError as e:
      assert f"'{name}' cannot serve this layer: " in str(e), cell
      refused += 1
      continue
    truth = outcome("dot_product", cell)
    noise = 2e-5 if cell["dtype"] == "float32" else 5e-2  # sums of 37 terms; weights of 8 bits
    for ours, theirs in zip(found, truth):
      ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
      scale = max(1.0, np.abs(theirs).max())
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=noise * scale, err_msg=str(cell))
  return tried, refused, tried - refused


def report(name, counts):
  tried, refused, compared = counts
  print(f"\n{name}: {tried} cells tried, {refused} refused in words, {compared} equal dot_product")


@pytest.mark.parametrize("name", STRIDES)
def test_every_cell_equals_the_reference_or_is_refused(name):
  counts = tally(name, CELLS[:: STRIDES[name]])
  report(name, counts)
  assert counts[2] >= (counts[0] if name == "blockwise" else 1)  # blockwise refuses nothing


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", SLOW)
def test_many_cells_equal_the_reference_or_are_refused(name, part, capsys):
  counts = tally(name, CELLS[:: SLOW[name]][part::PARTS])
  jax.clear_caches()  # a compiled cell takes memory maps, of which a process may have so many
  with capsys.disabled():
    report(name, counts)


def test_every_kernel_is_in_the_matrix_or_around_one():
  around = {"ring", "ulysses", "all_gather"}  # tests/kernels/test_context.py has theirs
  assert set(kernels._kernels) - around == {"dot_product", *STRIDES}
