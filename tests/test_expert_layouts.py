"""Experts that are split over devices train to the numbers of one device, whichever path computes
them.

By plain descent: see test_moe_equivalence.
"""

import pytest

from tests.test_layouts import LENGTH, PLAIN, ROWS, apart, trained, ways

MIXTRAL = (
  *("decoder_block=mixtral", "num_experts=8", "base_mlp_dim=24", "opt_type=sgd"),
  *("learning_rate=0.1", "load_balance_loss_weight=0.1"),
)
RICH = (  # everything that a mixture may have, and more active experts than a device has
  *("decoder_block=moe", "num_experts=8", "num_experts_per_tok=5", "base_mlp_dim=24"),
  *("shared_experts=1", "routed_score_func=sigmoid", "routed_bias=true", "mlp_bias=true"),
  *("routed_bias_update_rate=0.001", "opt_type=sgd", "learning_rate=0.1"),
  *("load_balance_loss_weight=0.1",),
)
ALL, FEW = ("sparse_matmul=false",), ("sparse_matmul=false", "capacity_factor=1.0")
MODELS = {
  "dropless": MIXTRAL,
  "all": (*MIXTRAL, *ALL),
  "limited": (*MIXTRAL, *FEW),  # drops some tokens
  "rich": RICH,
  "rich, all": (*RICH, *ALL),
  "rich, limited": (*RICH, *FEW),
  "weighed inputs": (*RICH, "blocks={layer: {moe: {weigh_inputs: true}}}"),
  "weighed inputs, all": (*RICH, "blocks={layer: {moe: {weigh_inputs: true}}}", *ALL),
  "latent": (
    *("decoder_block=deepseek3", "num_experts=8", "base_moe_mlp_dim=24", "shared_experts=1"),
    *("first_num_dense_layers=1", "n_routing_groups=4", "topk_routing_group=2", "q_lora_rank=8"),
    *("kv_lora_rank=8", "qk_nope_head_dim=8", "qk_rope_head_dim=4", "v_head_dim=8"),
    *("base_num_kv_heads=4", "opt_type=sgd", "learning_rate=0.1"),
  ),
}
LAYOUTS = {
  "expert 8": ways(expert=8),
  "expert 4 fsdp 2": ways(expert=4, fsdp=2),
  "expert 4 tensor 2": ways(expert=4, tensor=2),
  "expert 2 data 4": ways(expert=2, data=4),
  "expert 2 fsdp 2 tensor 2": ways(expert=2, fsdp=2, tensor=2),
  "expert 2 data 2 fsdp 2": ways(expert=2, data=2, fsdp=2),
  "expert 2 fsdp_transpose 2 tensor 2": ways(expert=2, fsdp_transpose=2, tensor=2),
  "expert 2 context 2 fsdp 2": (*ways(expert=2, context=2, fsdp=2), PLAIN),
  "expert 2 fsdp 2 tensor_sequence 2": ways(expert=2, fsdp=2, tensor_sequence=2),
  "expert": ("custom_mesh_and_rule=expert", *ways(expert=4, tensor=2)),
  "expert_as_context": (
    *("custom_mesh_and_rule=expert_as_context", *ways(expert=2, fsdp=2, tensor=2)),
    PLAIN,
  ),
  "expert_as_context, ring": (
    *("custom_mesh_and_rule=expert_as_context", *ways(expert=4, tensor=2)),
    "context_parallel_strategy=ring",
  ),
  "experts over fsdp and expert": (
    *ways(fsdp=2, expert=4),
    "logical_axis_rules={exp: [fsdp, expert], embed_no_exp: []}",
  ),
  "experts over expert and context": (
    *(*ways(expert=4, context=2), PLAIN),
    "logical_axis_rules={exp: [expert, context], embed_no_exp: []}",
  ),
  "experts over tensor": (  # which splits no tokens
    *ways(fsdp=4, tensor=2),
    "logical_axis_rules={exp: [tensor], mlp: [fsdp_transpose]}",
  ),
  "decode": ("custom_mesh_and_rule=decode", *ways(expert=2, data=2, tensor=2)),
}
WIDELY = (  # with every model, the others with the first ones
  "expert 4 fsdp 2",
  "expert 2 fsdp 2 tensor 2",
  "expert 2 context 2 fsdp 2",
  "expert_as_context",
)
FAST = {
  "expert 2 fsdp 2 tensor 2": "dropless",
  "expert_as_context": "limited",
}


def check(layout, model, rows=ROWS, length=LENGTH, parts=1):
  sizes = (rows, length, parts)
  loss, parameters = apart(
    trained(LAYOUTS[layout], MODELS[model], *sizes), trained(None, MODELS[model], *sizes)
  )
  print(f"{layout} | {model} | {rows} x {length} in {parts} | {loss:.1e} | {parameters:.1e}")
  assert loss < 1e-5 and parameters < 1e-4


@pytest.mark.parametrize(
  ("layout", "model"),
  [
    pytest.param(layout, model, marks=() if FAST.get(layout) == model else pytest.mark.slow)
    for layout in LAYOUTS
    for model in (MODELS if layout in WIDELY else ("dropless", "all", "limited"))
    if model != "limited" or "ring" not in layout
  ],
)
def test_splitting_the_experts_changes_no_number(layout, model):
  check(layout, model)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "length", "parts"), [(8, 8, 1), (16, 128, 2), (64, 16, 1)])
@pytest.mark.parametrize("model", ["dropless", "all", "limited"])
@pytest.mark.parametrize("layout", ["expert 4 fsdp 2", "expert 2 fsdp 2 tensor 2"])
def test_nor_does_it_with_few_tokens_or_many(layout, model, rows, length, parts):
  check(layout, model, rows, length, parts)
