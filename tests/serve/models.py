"""Small decoders to generate with, on one device or on a mesh."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from maxtext import config, sharding
from maxtext.layers.decoder import Decoder
from maxtext.layers.merging import Plan
from maxtext.layers.params import Compute
from maxtext.masks import Mask
from maxtext.specs import (
  AttentionSpec,
  BlockSpec,
  DecoderSpec,
  DeltaSpec,
  MlpSpec,
  NormSpec,
  Stage,
)

VOCAB, WIDTH, POSITIONS = 64, 32, 48
LONGEST = 48  # tokens of a row in these tests
AXES = (
  *("data", "fsdp", "fsdp_transpose", "context", "context_autoregressive"),
  *("tensor", "autoregressive"),
)
DEFAULTS = config.load([], {})


def block(window=None, **more):
  return BlockSpec(AttentionSpec(4, 2, 8, window=window, **more), MlpSpec(96))


def linear():
  """Delta nets, then attention."""
  return BlockSpec(mlp=MlpSpec(96), delta=DeltaSpec(2, 4, 8, 8, conv=4))


def learned():
  norm = NormSpec("layer", 1e-5)
  attention = AttentionSpec(4, 4, 8, rope=None, bias=True)
  each = BlockSpec(attention, MlpSpec(96, ("gelu",), bias=True), norm=norm)
  return DecoderSpec(WIDTH, VOCAB, (Stage((each,), 2),), norm, tied=True, positions=POSITIONS)


SPECS = {
  "grouped": DecoderSpec(WIDTH, VOCAB, (Stage((block(),), 2),)),
  "windowed": DecoderSpec(WIDTH, VOCAB, (Stage((block(window=4),), 2),)),
  "learned": learned(),
  "linear": DecoderSpec(WIDTH, VOCAB, (Stage((linear(),), 2), Stage((block(),)))),
  "mixed": DecoderSpec(
    WIDTH, VOCAB, (Stage((block(window=3), block()), 2), Stage((block(5),))), tied=True
  ),
}


@dataclasses.dataclass(frozen=True)
class Model:
  """What the engine needs of a program, and parameters for it."""

  name: str
  plan: Plan
  layout: sharding.Layout
  spec: DecoderSpec
  params: dict[str, jax.Array]

  def logits(self, ids):
    """One row [t] -> [t v] in one pass without a cache, on one device, scanned."""
    padded = np.zeros((1, LONGEST), np.int32)  # a token does not see those after it
    padded[0, : len(ids)] = ids
    return np.asarray(_one_pass(self.name)(build(self.name).params, padded))[: len(ids)]


@functools.cache
def _one_pass(name):
  plan, positions = build(name).plan, np.arange(LONGEST, dtype=np.int32)[None]
  return jax.jit(lambda params, ids: plan.merge(params)(ids, Mask.of(positions))[0])


@functools.cache
def build(name, scan=True, policy="none", mode="auto", **sizes):
  memory = dataclasses.replace(DEFAULTS.memory, scan_layers=scan, remat_policy=policy)
  spec, split = SPECS[name], "context_autoregressive" in sizes
  compute = Compute(kernel="autoselected" if split else "dot_product")
  plan = Plan.of(functools.partial(Decoder, spec, compute, memory))
  shape = [sizes.get(axis, 1) for axis in AXES]
  devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
  rules = {k: tuple(v) for k, v in DEFAULTS.mesh.logical_axis_rules.items()}
  kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
  mesh = Mesh(devices, AXES, axis_types=(kind,) * len(AXES))
  layout = sharding.Layout(mesh, sharding.Rules(rules))
  random = np.random.default_rng(len(name))
  drawn = {path: _draw(random, path, p.shape) for path, p in sorted(plan.declared.items())}
  return Model(name, plan, layout, spec, jax.device_put(drawn, sharding.of(plan.declared, layout)))


def _draw(random, path, shape):
  """Parameters of size 1: those of a fresh model make it almost linear, which hides mistakes."""
  if path.endswith(("scale", "bias")):
    return random.normal(path.endswith("scale"), 0.2, shape).astype(np.float32)
  fan_in = 1 if path in ("embedding", "positions") else WIDTH
  return random.normal(0, fan_in**-0.5, shape).astype(np.float32)
