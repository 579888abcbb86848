"""What is published of the chips that models are trained on."""

from __future__ import annotations

import dataclasses
import re

GIB, GB, TERA = 2**30, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
  """What JAX calls one device: dense bf16 FLOP/s, bytes of memory, and bytes per second: to its
  memory, out of all its links to neighbours, and out to the network between groups of `reach`
  devices. Links run along the `dimensions` of a torus; 0: from each device to every other.
  """

  flops: float
  memory: float
  bandwidth: float
  links: float
  network: float
  reach: int
  dimensions: int = 0


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; links are half of the bidirectional figure
# there (v4: 2,400 Gbit/s), the network is that of a host's or pod's cards, per chip (v4: taken as
# v5p's). A 7x chip is two devices. GPUs: NVIDIA's and AMD's data sheets of the SXM and OAM modules,
# links half of NVLink's and Infinity Fabric's total; the network is one card of 200 (A100) or 400
# Gbit/s for each, as in NVIDIA's DGX.
CHIPS = {
  "v4": Chip(275 * TERA, 32 * GIB, 1200 * GB, 300 * GB, 6.25 * GB, 4096, 3),
  "v5e": Chip(197 * TERA, 16 * GIB, 819 * GB, 200 * GB, 3.125 * GB, 256, 2),
  "v5p": Chip(459 * TERA, 95 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, 6144, 3),
  "v6e": Chip(918 * TERA, 32 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, 256, 2),
  "tpu7x": Chip(1153.5 * TERA, 96 * GIB, 3690 * GB, 300 * GB, 6.25 * GB, 18432, 3),
  "a100": Chip(312 * TERA, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 8),
  "h100": Chip(989.4 * TERA, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 8),
  "h200": Chip(989.4 * TERA, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 8),
  "b200": Chip(2250 * TERA, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 8),
  "mi300x": Chip(1307.4 * TERA, 192 * GB, 5300 * GB, 448 * GB, 50 * GB, 8),
}

# Published dense bf16 peaks in TFLOP/s of what JAX calls one device: Google's pages on Cloud TPU
# architecture (a v2, v3 or 7x chip is two devices); NVIDIA's and AMD's data sheets, half of the
# figure where that is for sparse matrices. The first pattern that is found counts.
_PEAKS = (
  (r"TPU v2", 23),
  (r"TPU v3", 61.5),
  (r"TPU v4 lite", 138),
  (r"TPU v4", 275),
  (r"TPU v5 ?(lite|e)", 197),
  (r"TPU v5", 459),
  (r"TPU v6 ?(lite|e)", 918),
  (r"TPU ?7x?\b", 1153.5),
  (r"\bA100\b", 312),
  (r"\bH100 NVL\b|\bH200 NVL\b", 835.5),
  (r"\bH100 PCIe\b", 756),
  (r"\bH100\b|\bH200\b|\bGH200\b", 989.4),
  (r"\bGB200\b", 2500),
  (r"\bB200\b", 2250),
  (r"\bL4\b", 121),
  (r"\bL40S\b", 362),
  (r"\bMI300X\b", 1307.4),
)


def peak_flops(device_kind: str) -> float | None:
  """The published bf16 FLOP/s of a JAX `device_kind`; None where it is not known (a CPU)."""
  for pattern, tera in _PEAKS:
    if re.search(pattern, device_kind, re.IGNORECASE):
      return tera * 1e12
  return None
