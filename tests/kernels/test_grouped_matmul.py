"""Every kernel for products of groups equals the products one by one, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext.kernels.grouped_matmul import Product, Tiles, grouped_matmul

KERNELS = {
  "tiles": Product("tiles"),
  "ragged": Product("ragged"),
  "megablox": Product("megablox", interpret=True),
}
SIZES = {
  "uneven": (40, [7, 0, 20, 1]),  # and 12 rows of no group
  "more than a block": (700, [600, 0, 90]),
  "one": (16, [0, 16, 0]),
  "none": (6, [0, 0]),
  "few": (3, [0, 1, 0, 0, 2, 0, 0]),
}


def draw(rows, groups, width=8, out=6):
  random = np.random.default_rng(0)
  made = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  return made(rows, width), made(groups, width, out), made(rows, out), made(rows)


def plain(x, w, g, share, sizes):
  """Products times shares, and the gradients of their sum weighted by g, in float64."""
  x, w, g, share = (np.asarray(a, np.float64) for a in (x, w, g, share))
  y, dx, dw, begin = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape), 0
  weighed = g * share[:, None]
  for e, size in enumerate(sizes):
    rows = slice(begin, begin + size)
    y[rows], dx[rows], dw[e] = x[rows] @ w[e], weighed[rows] @ w[e].T, x[rows].T @ weighed[rows]
    begin += size
  return y * share[:, None], dx, dw, (y * g).sum(1)


@pytest.mark.parametrize(
  "kernel, case",
  [
    pytest.param(k, c, marks=pytest.mark.slow if k == "megablox" and c != "uneven" else ())
    for k in KERNELS
    for c in SIZES
  ],
)
def test_every_kernel_multiplies_each_group_by_its_matrix(kernel, case):
  rows, sizes = SIZES[case]
  x, w, g, share = draw(rows, len(sizes))

  def both(sizes, *given):
    y, pull = jax.vjp(lambda x, w, *s: grouped_matmul(KERNELS[kernel], x, w, sizes, *s), *given)
    return y, *pull(g)

  for given in ((x, w), (x, w, share)):
    found = jax.jit(both)(jnp.asarray(sizes, jnp.int32), *given)
    want = plain(x, w, g, share if len(given) > 2 else np.ones(rows), sizes)
    for a, b in zip(found, want):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)  # float32 sums of up to 600 products


def test_a_gradient_is_summed_in_float32():
  """Ones and 2^-9 added up in bfloat16 would stop growing at 256."""
  x, w = jnp.ones((512, 1), jnp.bfloat16), jnp.zeros((1, 1, 1))
  total = lambda w: grouped_matmul(Product("tiles"), x, w, jnp.array([512])).astype("float32").sum()
  assert float(jax.grad(total)(w)[0, 0, 0]) == 512


@pytest.mark.parametrize("rows, groups", [(1, 1), (5, 8), (64, 8), (700, 3), (4096, 8), (640, 128)])
def test_tiles_waste_few_rows_and_always_suffice(rows, groups):
  """At most as many again as there are rows, or 64 for each group."""
  random = np.random.default_rng(0)
  for _ in range(2):
    sizes = random.multinomial(rows, random.dirichlet(np.full(groups, 0.3)))
    tiles = Tiles.of(rows, jnp.asarray(sizes))
    covered = [(int(b), min(int(b) + tiles.side, int(e))) for b, e in zip(tiles.begin, tiles.end)]
    assert sum(max(end - begin, 0) for begin, end in covered) == rows
    assert tiles.side * len(covered) <= 2 * rows + 1


def test_a_platform_has_its_kernel():
  assert Product.on("tpu").kernel == "megablox"
  assert Product.on("tpu", megablox=False).kernel == "ragged"
  assert Product.on("gpu").kernel == Product.on("cuda").kernel == "ragged"
  assert Product.on("cpu").kernel == "tiles"
