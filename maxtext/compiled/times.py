"""How long a compiled step should take: an estimate, with what it does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from maxtext import hlo
from maxtext.compiled.schedule import Profile
from maxtext.estimate.chips import CHIPS
from maxtext.estimate.roofline import Network
from maxtext.program import Program
from maxtext.topology import KINDS, kind_named


@dataclasses.dataclass(frozen=True)
class Time:
  """Seconds of a step: the compiler's `cycles`, hand-written `kernels` at the chip's peak, and what
  is sent while nothing is computed (`exposed`); `blind` says what is not known.
  """

  cycles: float
  kernels: float
  exposed: float
  tokens_per_second_per_device: float
  mfu: float
  blind: tuple[str, ...]

  @property
  def total(self) -> float:
    return self.cycles + self.kernels + self.exposed


def time_of(
  built: Program,
  walked: Profile,
  sent: Sequence[hlo.Collective],
  work: Mapping[str, float],
) -> Time | None:
  """Of a step whose compiler estimates cycles; None for others."""
  mesh, config = built.layout.mesh, built.config
  kind = kind_named(mesh.devices.flat[0].device_kind)
  if kind is None or not walked.cycles:
    return None
  chip, clock = CHIPS[kind], KINDS[kind].clock
  # to the two products of the forward pass kernels add seven on the way back, four for keys and
  # values and three for queries, or five in one loop; a model needs four
  again, products = work["flops_again"] > 0, 7 if config.kernel.sa_use_fused_bwd_kernel else 9
  in_kernels = work["attention_flops"] * (products / 2 + again) / 3
  if config.experts.sparse_matmul and config.experts.megablox:
    in_kernels += work["expert_flops"] * (3 + again) / 3
  kernels = in_kernels / chip.flops if walked.kernels else 0.0
  network = Network(chip, mesh.shape, config.mesh.dcn())
  exposed = sum(one.times * _waited(one, network, clock) for one in sent)
  total = walked.cycles / clock + kernels + exposed
  tokens = config.training.global_batch(mesh.size) * config.training.max_target_length
  return Time(
    walked.cycles / clock,
    kernels,
    exposed,
    tokens / mesh.size / total,
    work["flops"] / chip.flops / total,
    tuple(_blind(built, walked)),
  )


def _waited(one: hlo.Collective, network: Network, clock: float) -> float:
  """Seconds of a collective in which nothing is computed."""
  size = one.size * one.ways if one.kind == "reduce-scatter" else one.size
  if one.kind == "collective-permute":
    seconds = size / network.speed(one.axes)
  else:
    seconds = network.seconds(one.axes, size, 2 if one.kind == "all-reduce" else 1)
  return max(seconds - (one.beside or 0) / clock, 0.0)


def _blind(built: Program, walked: Profile) -> list[str]:
  found = ["links and memory are taken at their published speed, and hosts as never late"]
  if walked.kernels:
    experts = built.config.experts
    routed = built.spec.mixtures and experts.sparse_matmul and experts.megablox
    what = "attention and experts are" if routed else "attention is"
    calls = f"{walked.kernels} calls of hand-written kernels have no cycles"
    found.insert(0, f"{calls}: {what} taken at the chip's peak")
  return found
