"""Norms, as data."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class NormSpec:
  """Normalisation over the width: root mean square, the same with a scale of 1 + weight or with no
  weight at all (l2), or layer norm with a bias.
  """

  kind: Literal["rms", "rms_plus_one", "l2", "layer"] = "rms"
  eps: float = 1e-6
