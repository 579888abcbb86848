"""Predict the next token: the objective of pre-training and of fine-tuning on text."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from maxtext.layers.decoder import Decoder
from maxtext.layers.routing import Routed, balance_loss
from maxtext.masks import Mask
from maxtext.objectives.cross_entropy import Head, cross_entropy
from maxtext.objectives.mean import Mean

Batch = dict[str, jax.Array]
Sums = dict[str, Any]  # Mean by name, and 'loads'


@dataclasses.dataclass(frozen=True)
class NextToken:
  """(model, batch, dropout key) -> sums over the tokens that are not padding, by name; 'loss' is
  minimised.

  Rows hold documents one after the other, each in one piece and in order, unless not `ordered`.
  `z_loss` weighs the z-loss of PaLM (Chowdhery et al. 2022, section 5), `tiles` cuts the logits.
  Where the model predicts several tokens ahead, the mean of those cross entropies weighs `mtp`;
  where it mixes experts, the balance loss weighs `balance`, and 'loads' says how many tokens chose
  each expert, [l e] by the path of the block.
  """

  z_loss: float = 0.0
  tiles: int = 1
  ordered: bool = True
  mtp: float = 0.0
  balance: float = 0.0

  def __call__(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
    mask = Mask.of(batch["inputs_position"], batch["inputs_segmentation"], ordered=self.ordered)
    keys = (None, None) if key is None else (key, jax.random.fold_in(key, 1))
    x, _, routed = model.hidden(batch["inputs"], mask, key=keys[0])
    equation, p = model.head()
    compute = model.compute
    head = Head(
      equation=equation,
      axes=p.get_metadata()["axes"],
      scale=model.spec.logit_scale,
      soft_cap=model.spec.final_soft_cap,
      z_loss=self.z_loss,
      tiles=self.tiles,
      precision=compute.matmul_precision,
      f32=compute.f32_logits,
    )
    weights = (batch["targets_segmentation"] != 0).astype(jnp.float32)
    loss, entropy, z = cross_entropy(head, x, p[...], batch["targets"], weights)
    count = weights.sum()
    found: Sums = {"lm_loss": Mean(entropy, count), "z_loss": Mean(z, count)}
    if (further := model.spec.mtp) is not None:
      plain = dataclasses.replace(head, z_loss=0.0)
      more, said = self._further(model, plain, x, mask, batch, keys[1])
      more = self.mtp / further.layers * more
      loss, found["mtp_loss"] = loss + more, Mean(jax.lax.stop_gradient(more), count)
      routed = {**routed, **said}
    if routed:
      found["loads"] = {path: layers.load for path, layers in routed.items()}
    if self.balance and routed:
      tokens = (batch["inputs_segmentation"] != 0).sum(dtype=jnp.float32)
      more = self.balance * balance_loss(list(routed.values()), tokens) * count
      loss, found["moe_lb_loss"] = loss + more, Mean(jax.lax.stop_gradient(more), count)
    return {"loss": Mean(loss, count), **found}

  @staticmethod
  def _further(
    model: Decoder,
    head: Head,
    x: jax.Array,
    mask: Mask,
    batch: Batch,
    key: jax.Array | None,
  ) -> tuple[jax.Array, dict[str, Routed]]:
    """The sum over blocks and tokens of what multi-token prediction loses, and what the blocks'
    experts say. As in the paper, a block's mean is over all targets, also those at a document's end
    that it has nothing to say of.
    """
    (_, p), total = model.head(), jnp.zeros((), jnp.float32)
    routed: dict[str, Routed] = {}
    later = (ahead(batch["targets"], i) for i in itertools.count())
    for i, (y, said) in enumerate(model.ahead(x, later, mask, key), 1):
      same = ahead(batch["inputs_segmentation"], i) == batch["inputs_segmentation"]
      there = same & (ahead(batch["targets_segmentation"], i) != 0)
      weights = there.astype(jnp.float32)
      total += cross_entropy(head, y, p[...], ahead(batch["targets"], i), weights)[0]
      routed |= said
    return total, routed


def ahead(column: jax.Array, by: int) -> jax.Array:
  """column [b t] -> [b t]: what stands so many tokens later, 0 beyond the end."""
  return jnp.pad(column[:, by:], [(0, 0), (0, by)])
