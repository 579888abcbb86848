"""Multi-token prediction: blocks after the decoder's last that see further ahead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext.layers.blocks import Block
from maxtext.layers.norms import make_norm
from maxtext.layers.params import Compute, Dense
from maxtext.layers.routing import Routed
from maxtext.masks import Mask
from maxtext.sharding import STREAM, constrain, joined
from maxtext.specs import BlockSpec, NormSpec


class Ahead(Block):
  """A block that predicts the token after the one that is shown to it (Liu et al. 2024, arXiv
  2412.19437, section 2.2): from what the block before made of a token and from the embedding of a
  later one, normalised apart, side by side and projected to the width. `head_norm` stands before
  the unembedding.
  """

  def __init__(self, spec: BlockSpec, norm: NormSpec, width: int, compute: Compute, rngs: nnx.Rngs):
    super().__init__(spec, width, compute, rngs)
    self.token_norm, self.hidden_norm, self.head_norm = (
      make_norm(norm, width, compute, rngs) for _ in range(3)
    )
    self.joint = Dense(rngs, compute, "btf,fd->btd", mlp=2 * width, embed=width)

  def ahead(
    self, x: jax.Array, tokens: jax.Array, mask: Mask, key: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, Routed | None]:
    """x [b t d] of each token, embeddings [b t d] of later ones -> what the next such block takes
    as x, and what is unembedded, [b t d] each; and what experts say of their routing.
    """
    parts = self.token_norm(tokens), self.hidden_norm(x)
    both = jnp.concatenate([*map(joined, parts)], axis=-1)
    y = constrain(self.joint(both), *STREAM)
    y, _, routed = self(y, mask, None, key)
    return y, joined(self.head_norm(y)), routed
