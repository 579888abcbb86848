"""A model whose layers are in stages trains to the numbers of one device, on any mesh."""

from __future__ import annotations

import pytest

from tests import test_expert_layouts as experts
from tests import test_layouts as layouts
from tests.test_layouts import apart, trained

ROWS, LENGTH = 32, 16


def ways(**sizes):
  return tuple(key.replace("_stage_", "_pipeline_") for key in layouts.ways(**sizes))


def deep(layers, *keys):
  return (*keys, f"base_num_decoder_layers={layers}")


DENSE, MIXTRAL = layouts.MODELS["gqa"], experts.MODELS["dropless"]
MODELS = {
  "gqa": deep(4, *DENSE),
  "descent": deep(4, *DENSE, "opt_type=sgd", "learning_rate=0.1"),
  "8 layers": deep(8, *DENSE),
  "window": deep(4, *layouts.MODELS["window"]),
  "learned": deep(4, *layouts.MODELS["learned"]),
  # by plain descent: adamw makes noise of the gradients of so many layers show on every mesh
  "linear": deep(4, *layouts.MODELS["linear"][:-2], "opt_type=sgd", "learning_rate=0.01"),
  "dropless": deep(4, *MIXTRAL),
  "limited": deep(4, *experts.MODELS["limited"]),
  "rich": deep(4, *experts.MODELS["rich"]),
  "latent": deep(5, *experts.MODELS["latent"]),  # the first layer is dense, and outside
  "cycles": deep(6, *DENSE, "pipeline_parallel_layers=4"),
}
TWICE = ("num_pipeline_repeats=2",)
DELAYED = ("pipeline_delay_activation_forwarding=true",)


def parts(count):
  return (f"num_pipeline_microbatches={count}",)


MOE_RULES = ("custom_mesh_and_rule=pipeline_moe",)
CASES = {
  "stage 2 fsdp 4": ("gqa", ways(stage=2, fsdp=4)),
  "stage 2 fsdp 2 tensor 2, twice": ("gqa", (*ways(stage=2, fsdp=2, tensor=2), *TWICE, *parts(4))),
  "stage 4 tensor 2, twice, 8 parts": ("8 layers", (*ways(stage=4, tensor=2), *TWICE, *parts(8))),
  "stage 4 data 2, 4 parts": ("8 layers", (*ways(stage=4, data=2), *parts(4))),
  "stage 4 data 2, 8 parts, delayed": ("8 layers", (*ways(stage=4, data=2), *DELAYED)),
  "stage 4 fsdp 2, twice, 8 parts, delayed": (
    *("8 layers", (*ways(stage=4, fsdp=2), *TWICE, *DELAYED)),
  ),
  "stage 8, 8 parts": ("8 layers", (*ways(stage=8), *parts(8))),
  "stage 2 data 2 tensor 2, 4 parts, delayed": (
    *("gqa", (*ways(stage=2, data=2, tensor=2), *DELAYED)),
  ),
  "stage 2 fsdp_transpose 2 tensor_transpose 2": (
    *("gqa", ways(stage=2, fsdp_transpose=2, tensor_transpose=2)),
  ),
  "stage 2 context 2 fsdp 2": ("window", ways(stage=2, context=2, fsdp=2)),
  "stage 2 context 4, ring": ("gqa", (*ways(stage=2, context=4), layouts.RING)),
  "stage 2 context 2 tensor 2, ulysses": (
    *("gqa", (*ways(stage=2, context=2, tensor=2), layouts.ULYSSES)),
  ),
  "stage 2 tensor_sequence 2 fsdp 2": ("gqa", ways(stage=2, tensor_sequence=2, fsdp=2)),
  "stage 2 fsdp 4, unrolled": ("gqa", (*ways(stage=2, fsdp=4), "scan_layers=false")),
  "stage 2 fsdp 4, remat full": ("gqa", (*ways(stage=2, fsdp=4), "remat_policy=full")),
  "stage 2 data 4, zero": ("gqa", (*ways(stage=2, data=4), layouts.ZERO)),
  "stage 4 fsdp 2, learned": ("learned", ways(stage=4, fsdp=2)),
  "stage 2 fsdp 4, some layers": ("cycles", ways(stage=2, fsdp=4)),
  "stage 2 expert 2 fsdp 2, dropless": ("dropless", ways(stage=2, expert=2, fsdp=2)),
  "stage 2 expert 2 tensor 2, limited": ("limited", ways(stage=2, expert=2, tensor=2)),
  "stage 2 expert 2 tensor 2, rich, twice": (
    *("rich", (*ways(stage=2, expert=2, tensor=2), *TWICE, *parts(4))),
  ),
  "stage 2 expert 4, latent": ("latent", ways(stage=2, expert=4)),
  # of so few tokens adamw makes 2e-4 of the noise in rows of the embedding, on every mesh
  "by descent": ("descent", (*ways(stage=2, fsdp=2, tensor=2), *TWICE, *parts(4))),
  "pipeline_moe": ("dropless", (*MOE_RULES, *ways(stage=2, expert=2, tensor=2))),
}
FAST = ("stage 2 fsdp 2 tensor 2, twice", "stage 2 expert 2 tensor 2, limited")


def check(name, rows=ROWS, length=LENGTH, passes=1):
  model, mesh = CASES[name]
  sizes = (rows, length, passes)
  loss, parameters = apart(
    trained(mesh, MODELS[model], *sizes), trained(None, MODELS[model], *sizes)
  )
  print(f"{name} | {model} | {rows} x {length} in {passes} | {loss:.1e} | {parameters:.1e}")
  assert loss < 1e-5 and parameters < 1e-4


@pytest.mark.parametrize(
  "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_stages_change_no_number(name):
  check(name)


@pytest.mark.slow
def test_nor_with_delta_nets():
  CASES["delta nets"] = "linear", ways(stage=2, fsdp=4)
  check("delta nets", rows=16)  # of more, the noise is above the bound on every mesh


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "length", "passes"), [(16, 8, 1), (32, 128, 1), (64, 16, 2)])
@pytest.mark.parametrize("name", ["by descent", "stage 2 expert 2 fsdp 2, dropless"])
def test_nor_with_few_tokens_or_many(name, rows, length, passes):
  check(name, rows, length, passes)
