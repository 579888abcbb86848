"""The estimate counts what the model has and what XLA multiplies."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxtext import config, estimate
from maxtext.layers.decoder import Decoder
from maxtext.layers.merging import Plan
from maxtext.layers.params import DROPLESS, Compute
from maxtext.masks import Mask
from maxtext.objectives.next_token import NextToken
from maxtext.specs import (
  AttentionSpec,
  BlockSpec,
  DecoderSpec,
  DeltaSpec,
  MlpSpec,
  MoeSpec,
  MtpSpec,
  NormSpec,
  QkNormSpec,
  Stage,
)

ROWS, LENGTH = 2, 512
LAYER = NormSpec("layer")
LLAMA = DecoderSpec(
  width=512, vocab=4096, stages=(Stage((BlockSpec(AttentionSpec(8, 2, 64), MlpSpec(2048)),), 2),)
)
GELU = MlpSpec(2048, ("gelu",), bias=True)
GPT = DecoderSpec(
  width=512,
  vocab=4096,
  stages=(Stage((BlockSpec(AttentionSpec(8, 8, 64, None, bias=True), GELU, norm=LAYER),), 2),),
  norm=LAYER,
  tied=True,
  positions=LENGTH,
)
NARROW = AttentionSpec(6, 3, 16, window=4, qk_norm=QkNormSpec(), bias=True)
MIXED = MoeSpec(
  6,
  2,
  MlpSpec(20, bias=True),
  MlpSpec(12, bias=True),
  shared_gate=True,
  score="sigmoid",
  router_bias=True,
  choice_bias=True,
  groups=2,
  active_groups=1,
)
SPARSE = DecoderSpec(
  width=512,
  vocab=4096,
  stages=(
    Stage((BlockSpec(AttentionSpec(8, 2, 64), moe=MoeSpec(8, 2, MlpSpec(1024), MlpSpec(512))),), 2),
  ),
)
ODD = DecoderSpec(
  width=48,
  vocab=96,
  stages=(
    Stage(
      (
        BlockSpec(NARROW, MlpSpec(80, bias=True)),
        BlockSpec(AttentionSpec(2, 1, 8, qk_norm=QkNormSpec("layer")), MlpSpec(64, ("relu",))),
      ),
      3,
    ),
    Stage((BlockSpec(AttentionSpec(2, 2, 24), MlpSpec(100), norm=LAYER),)),
    Stage((BlockSpec(NARROW, moe=MIXED),), 2),
    Stage((BlockSpec(mlp=MlpSpec(24, bias=True), delta=DeltaSpec(2, 6, 8, 12, conv=3)),)),
  ),
  mtp=MtpSpec(2, BlockSpec(NARROW, MlpSpec(80, bias=True), norm=LAYER)),
)


def plan_of(spec: DecoderSpec) -> Plan:
  memory = dataclasses.replace(config.load([], {}).memory, scan_layers=False, remat_policy="none")
  # of each row an expert takes as many tokens as it has to where all are equally loaded
  experts = dataclasses.replace(DROPLESS, sparse_matmul=False, capacity_factor=1.0)
  compute = Compute(kernel="dot_product", experts=experts)
  return Plan.of(functools.partial(Decoder, spec, compute, memory))


def forward(plan: Plan):
  positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
  return lambda params, batch: plan.merge(params)(batch["inputs"], Mask.of(positions))


def gradient(plan: Plan):
  return jax.grad(lambda params, batch: NextToken()(plan.merge(params), batch)["loss"].total)


@pytest.mark.parametrize("spec", [LLAMA, GPT, ODD], ids=["llama", "gpt", "odd"])
def test_the_parameter_count_is_the_models(spec):
  declared = plan_of(spec).declared.values()
  assert estimate.parameter_count(spec) == sum(math.prod(p.shape) for p in declared)


@pytest.mark.parametrize("program, passes", [(forward, 1), (gradient, 3)], ids=["forward", "both"])
@pytest.mark.parametrize("spec", [LLAMA, GPT, SPARSE], ids=["llama", "gpt", "experts"])
def test_flops_are_those_that_xla_counts(spec, program, passes):
  """Within 3 %: XLA adds what is elementwise. dot_product makes all scores, twice the causal half.

  XLA counts the body of a scan once, so the layers are unrolled.
  """
  plan, tokens = plan_of(spec), ROWS * LENGTH
  params = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in plan.declared.items()}
  column = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  names = ("inputs", "inputs_position", "inputs_segmentation", "targets", "targets_segmentation")
  compiled = jax.jit(program(plan)).lower(params, dict.fromkeys(names, column)).compile()
  ours = estimate.forward_flops(spec, tokens, LENGTH) * passes
  made = ours.weights + 2 * ours.attention
  assert compiled.cost_analysis()["flops"] == pytest.approx(made, rel=0.03)
  assert compiled.cost_analysis()["flops"] >= made


def test_a_step_multiplies_six_times_per_parameter_and_token():
  flops = estimate.step_flops(LLAMA, 1000, 100)
  embedding = LLAMA.vocab * LLAMA.width
  norms = LLAMA.width * 5
  assert flops.weights == 6 * (estimate.parameter_count(LLAMA) - embedding - norms) * 1000
  assert flops.attention == 12 * 2 * 8 * 64 * (100 * 100 / 2) * (1000 / 100)


@pytest.mark.parametrize("window", [1, 5, 16, 40, None])
def test_attention_counts_the_pairs_that_a_window_leaves(window):
  """Against the mask itself, with the diagonal counted by half as in the square's causal half."""
  length = 40
  attention = AttentionSpec(4, 2, 8, window=window)
  spec = dataclasses.replace(LLAMA, stages=(Stage((BlockSpec(attention, MlpSpec(8)),)),))
  positions = jnp.arange(length)[None]
  seen = int(Mask.of(positions).narrow(window).dense().sum())
  width = min(window or length, length)
  ours = estimate.forward_flops(spec, length, length).attention / (4 * 4 * 8)
  assert ours == seen - width / 2


def test_a_delta_net_costs_the_same_for_every_token():
  block = BlockSpec(mlp=MlpSpec(8), delta=DeltaSpec(2, 4, 16, 24))
  spec = dataclasses.replace(LLAMA, stages=(Stage((block,), 3),))
  short, long = (estimate.forward_flops(spec, 4096, length) for length in (64, 4096))
  assert short == long and short.attention == 2 * 3 * 4 * 16 * 24 * 4096 * 3


def test_a_token_goes_through_the_three_products_of_each_expert_that_it_chose():
  assert estimate.expert_flops(SPARSE, 64) == 2 * 64 * (2 * 2 * 3 * 512 * 1024)
  fewer = dataclasses.replace(SPARSE.blocks[0].moe, active=1)
  less = dataclasses.replace(
    SPARSE, stages=(Stage((dataclasses.replace(SPARSE.blocks[0], moe=fewer),), 2),)
  )
  saved = (
    estimate.forward_flops(SPARSE, 64, 64).weights - estimate.forward_flops(less, 64, 64).weights
  )
  assert saved == estimate.expert_flops(less, 64) and estimate.expert_flops(LLAMA, 64) == 0


def test_each_block_of_multi_token_prediction_costs_a_block_a_projection_and_an_unembedding():
  block = LLAMA.blocks[-1]
  more = estimate.forward_flops(dataclasses.replace(LLAMA, mtp=MtpSpec(2, block)), 64, 64)
  base = estimate.forward_flops(LLAMA, 64, 64)
  layer = (base.weights / 2 / 64 - LLAMA.width * LLAMA.vocab) / 2
  each = layer + 2 * LLAMA.width**2 + LLAMA.width * LLAMA.vocab
  assert more.weights - base.weights == 2 * 2 * each * 64
  assert more.attention == 2 * base.attention


def test_tied_and_untied_unembeddings_cost_the_same():
  tied = dataclasses.replace(LLAMA, tied=True)
  assert estimate.step_flops(tied, 8, 8) == estimate.step_flops(LLAMA, 8, 8)
  saved = estimate.parameter_count(LLAMA) - estimate.parameter_count(tied)
  assert saved == LLAMA.vocab * LLAMA.width


@pytest.mark.parametrize(
  "kind, tera",
  [
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5e", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("TPU v6e", 918),
    ("TPU7x", 1153.5),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835.5),
    ("NVIDIA H200", 989.4),
    ("NVIDIA GH200 480GB", 989.4),
    ("NVIDIA B200", 2250),
    ("NVIDIA GB200", 2500),
    ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362),
    ("AMD Instinct MI300X", 1307.4),
  ],
)
def test_peaks_are_the_published_ones(kind, tera):
  assert estimate.peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H20", "NVIDIA L40", "TPU v9", "Tesla V100", ""])
def test_an_unknown_device_has_no_peak(kind):
  assert estimate.peak_flops(kind) is None


def test_bytes_are_those_of_one_devices_share():
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tensor"))
  split = NamedSharding(mesh, PartitionSpec("fsdp", None))
  whole = NamedSharding(mesh, PartitionSpec())
  shapes = {
    "w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=split),
    "b": jax.ShapeDtypeStruct((6,), jnp.bfloat16, sharding=whole),
  }
  assert estimate.bytes_per_device(shapes) == 8 * 6 * 4 // 2 + 6 * 2


def test_a_run_says_once_what_it_is():
  run = estimate.Estimate(13_000_000, estimate.Flops(3e12, 1e12), 2**24, 2**31)
  assert list(run.lines("TPU v5e", {"data": 1, "fsdp": 4, "tensor": 2}, 5 * 2**30)) == [
    "parameters: 13,000,000",
    "devices: 8 x TPU v5e, mesh fsdp 4 x tensor 2",
    "TFLOPs per step: 4 (weights 75.0%, attention 25.0%), per device 0.5; peak 197.0 TFLOP/s",
    "memory per device: state 2.02 GiB (parameters 16.00 MiB, optimizer 2.00 GiB), "
    "peak of a step 5.00 GiB",
  ]
  assert list(run.lines("cpu", {"data": 1}))[1:3] == [
    "devices: 1 x cpu",
    "TFLOPs per step: 4 (weights 75.0%, attention 25.0%), per device 4; peak not known, so no MFU",
  ]
