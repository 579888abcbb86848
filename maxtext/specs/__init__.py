"""What a decoder is, as data: a model family is a value of these types, not a class of its own.

Letters: d width, h query heads, g key/value heads, k head_dim, f mlp hidden, e experts,
v vocabulary.
"""

from maxtext.specs.attention import (
  AttentionSpec,
  CacheQuantSpec,
  LatentSpec,
  QkNormSpec,
  TemperatureSpec,
)
from maxtext.specs.decoder import BlockSpec, DecoderSpec, MtpSpec, Stage, staged
from maxtext.specs.delta import DeltaSpec
from maxtext.specs.feedforward import Activation, MlpSpec, MoeSpec
from maxtext.specs.norms import NormSpec
from maxtext.specs.rotary import (
  ROPE_TYPES,
  GridRopeSpec,
  LongScaling,
  NtkScaling,
  RopeSpec,
  SectionsSpec,
  WavelengthScaling,
  YarnScaling,
)

__all__ = [
  "ROPE_TYPES",
  "Activation",
  "AttentionSpec",
  "BlockSpec",
  "CacheQuantSpec",
  "DecoderSpec",
  "DeltaSpec",
  "GridRopeSpec",
  "LatentSpec",
  "LongScaling",
  "MlpSpec",
  "MoeSpec",
  "MtpSpec",
  "NormSpec",
  "NtkScaling",
  "QkNormSpec",
  "RopeSpec",
  "SectionsSpec",
  "Stage",
  "TemperatureSpec",
  "WavelengthScaling",
  "YarnScaling",
  "staged",
]
