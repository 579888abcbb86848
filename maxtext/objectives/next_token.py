"""Predict the next token: the objective of pre-training and of fine-tuning on text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from maxtext.layers.decoder import Decoder
from maxtext.masks import Mask
from maxtext.objectives.cross_entropy import Head, cross_entropy
from maxtext.objectives.mean import Mean

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class NextToken:
  """(model, batch, dropout key) -> sums over the tokens that are not padding, by name; 'loss' is
  minimised.

  Rows hold documents one after the other, each in one piece and in order, unless not `ordered`.
  `z_loss` weighs the z-loss of PaLM (Chowdhery et al. 2022, section 5), `tiles` cuts the logits.
  """

  z_loss: float = 0.0
  tiles: int = 1
  ordered: bool = True

  def __call__(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> dict[str, Mean]:
    mask = Mask.of(batch["inputs_position"], batch["inputs_segmentation"], ordered=self.ordered)
    x, _ = model.hidden(batch["inputs"], mask, key=key)
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
    return {"loss": Mean(loss, count), "lm_loss": Mean(entropy, count), "z_loss": Mean(z, count)}
