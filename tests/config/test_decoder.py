"""Block files: `${key}`, `like`, `if`, the pattern over the layers, and the scale."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from maxtext.config import documents
from maxtext.specs import QkNormSpec, RopeSpec, WavelengthScaling, YarnScaling

OWN = """
width: ${base_emb_dim}
blocks:
  local:
    attention:
      heads: ${base_num_query_heads}
      kv_heads: ${base_num_kv_heads}
      head_dim: ${head_dim}
      window: 16
      rope: {max_timescale: 1000}
    mlp: {hidden: "${base_mlp_dim}", activations: [gelu]}
  global: {like: local, attention: {window: null, rope: {factor: 8}}}
pattern: [local, local, global]
"""


def test_like_takes_over_all_but_what_differs(loaded):
  spec = loaded("decoder_block=own.yml", files={"own.yml": OWN}).decoder(259)
  local, _, last = spec.blocks[:3]
  assert (local.attention.window, last.attention.window) == (16, None)
  assert last.attention.rope.factor == 8 and last.attention.rope.max_timescale == 1000
  assert last.mlp == local.mlp and last.mlp.activations == ("gelu",)


def test_the_layers_are_the_stages_that_compile_the_fewest_blocks(loaded):
  def shape(layers: int) -> list[tuple[int, int]]:
    config = loaded(f"base_num_decoder_layers={layers}", "decoder_block=own.yml", files=files)
    return [(len(stage.blocks), stage.repeat) for stage in config.decoder(259).stages]

  files = {"own.yml": OWN}
  assert shape(3) == [(1, 2), (1, 1)] and shape(6) == [(3, 2)]
  assert shape(8) == [(3, 2), (1, 2)] and shape(2) == [(1, 2)]


def test_an_optional_part_may_depend_on_a_key(loaded):
  assert loaded().decoder(259).stages[0].blocks[0].attention.qk_norm is None
  attention = loaded("use_qk_norm=true").decoder(259).stages[0].blocks[0].attention
  assert attention.qk_norm == QkNormSpec("rms", 1e-5)


def test_what_has_a_case_is_the_entry_that_a_key_names(loaded):
  own = OWN.replace(
    "{max_timescale: 1000}",
    """
        max_timescale: {case: "${rope_type}", default: 1000, yarn: 2000}
        scaling:
          case: ${rope_type}
          default: null
          yarn: {kind: yarn, factor: 2, original_length: 64, attention_factor: null}""",
  ).replace(", rope: {factor: 8}", "")

  def rope(*argv):
    spec = loaded("decoder_block=own.yml", *argv, files={"own.yml": own}).decoder(259)
    return spec.stages[0].blocks[0].attention.rope

  assert (rope().max_timescale, rope().scaling) == (1000, None)
  assert rope("rope_type=yarn").max_timescale == 2000
  assert rope("rope_type=yarn").scaling == YarnScaling(factor=2, original_length=64)


def test_rope_type_names_the_scaling_of_rotary_positions(loaded):
  def rope(*argv):
    return loaded(*argv).decoder(259).stages[0].blocks[0].attention.rope

  assert rope() == RopeSpec()
  assert rope("rope_type=llama3.1").scaling == WavelengthScaling(factor=8, original_length=8192)
  assert rope("rope_type=llama3.1", "rope_use_scale=false") == RopeSpec()
  assert rope("rope_type=llama3.1", "rope_factor=32", "rope_interleave=true") == RopeSpec(
    interleave=True, scaling=WavelengthScaling(factor=32, original_length=8192)
  )
  yarn = YarnScaling(factor=40, original_length=4096, attention_factor=1.0)
  assert rope("rope_type=yarn") == RopeSpec(interleave=True, scaling=yarn)
  assert rope(
    "rope_type=yarn",
    "rope_factor=4",
    "original_max_position_embeddings=256",
    "beta_fast=16",
    "beta_slow=2",
    "rope_truncate=false",
    "rope_attention_scaling=true",
    "rope_interleave=false",
    "partial_rotary_factor=0.5",
  ) == RopeSpec(
    fraction=0.5,
    scaling=YarnScaling(factor=4, original_length=256, beta_fast=16, beta_slow=2, truncate=False),
  )


def test_a_key_counts_as_used_where_the_block_file_names_it(loaded, refused):
  files = {"own.yml": OWN}
  (line,) = refused("decoder_block=own.yml", "mlp_bias=true", files=files)
  assert line.startswith("command line  mlp_bias: decoder block 'own.yml' does not use it; leave")
  own = {"own.yml": OWN.replace("[gelu]", '[gelu], bias: "${mlp_bias}"')}
  config = loaded("decoder_block=own.yml", "mlp_bias=true", files=own)
  assert config.decoder(259).stages[0].blocks[0].mlp.bias


def test_a_size_that_the_block_file_refuses_is_complained_of_at_its_key(refused):
  own = OWN.replace("window: 16", "soft_cap: ${query_pre_attn_scalar}")
  own = own.replace("kv_heads: ${base_num_kv_heads}", "kv_heads: 4")
  files = {"own.yml": own}
  (line,) = refused(
    "decoder_block=own.yml",
    "base_num_query_heads=6",
    "base_num_kv_heads=3",
    "head_dim=8",
    files=files,
  )
  assert "base_num_kv_heads: decoder block" in line


def test_the_scale_is_spread_over_heads_and_mlp_then_width_then_layers(loaded):
  def sizes(scale: int) -> tuple[int, ...]:
    spec = loaded(f"global_parameter_scale={scale}").decoder(259)
    attention, mlp = spec.stages[0].blocks[0].attention, spec.stages[0].blocks[0].mlp
    return (
      spec.width,
      attention.heads,
      attention.kv_heads,
      mlp.hidden,
      spec.depth,
      attention.head_dim,
    )

  assert sizes(1) == (256, 8, 4, 768, 4, 32)
  assert sizes(2) == (256, 16, 8, 1536, 4, 32)
  assert sizes(4) == (512, 16, 8, 1536, 4, 32)
  assert sizes(8) == (512, 16, 8, 1536, 8, 32)
  assert sizes(16) == (512, 32, 16, 3072, 8, 32)


def test_the_two_families_differ_where_they_should(loaded):
  spec = loaded("decoder_block=gpt3", "dropout_rate=0.1").decoder(259)
  block = spec.stages[0].blocks[0]
  assert spec.tied and spec.positions == 2048 and spec.norm.kind == block.norm.kind == "layer"
  assert block.attention.rope is None and block.attention.bias and block.mlp.bias
  assert block.mlp.activations == ("gelu",) and block.dropout == 0.1
  plain = loaded().decoder(259)
  assert not plain.tied and not plain.positions and plain.stages[0].blocks[0].norm.kind == "rms"


def test_the_tokenizers_vocabulary_counts_where_none_is_set(loaded):
  assert loaded().decoder(300).vocab == 300
  assert loaded("vocab_size=512").decoder(300).vocab == 512


def test_packaged_block_files_are_found_by_name_or_path(loaded):
  path = documents.PACKAGED / "decoder_blocks" / "llama2.yml"
  for name in ("llama2", "configs/decoder_blocks/llama2.yml", str(path)):
    assert loaded(f"decoder_block={name}").architecture == loaded().architecture


def test_the_block_file_of_the_documentation_is_right(loaded):
  page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
  (own,) = re.findall(r"```yaml\n(# own\.yml.*?)```", page, re.DOTALL)
  spec = loaded("decoder_block=own.yml", files={"own.yml": own}).decoder(259)
  assert [b.attention.window for b in spec.blocks[:3]] == [128, 128, None]


def test_a_file_may_be_like_another_file(loaded):
  own = "like: olmo2\ntied: true\nblocks:\n  layer: {attention: {gate: true}}\n"
  spec = loaded("decoder_block=own.yml", files={"own.yml": own}).decoder(259)
  olmo = loaded("decoder_block=olmo2").decoder(259)
  block, plain = spec.blocks[0], olmo.blocks[0]
  assert spec.tied and not olmo.tied
  assert block.attention.gate and not block.pre_norm and block.attention.qk_norm.whole
  assert dataclasses.replace(block, attention=plain.attention) == plain


def test_a_file_that_is_like_none_or_like_itself_is_refused_on_its_line(refused):
  (line,) = refused("decoder_block=own.yml", files={"own.yml": "\nlike: olmo22\n"})
  assert line.startswith("own.yml:2  like: 'olmo22' is no decoder block, did you mean 'olmo2'?")
  files = {"own.yml": "like: ./b.yml\n", "b.yml": "tied: true\nlike: ./own.yml\n"}
  (line,) = refused("decoder_block=own.yml", files=files)
  assert line.startswith("b.yml:2  like: './own.yml' is like this file itself")


def test_what_is_wrong_in_a_file_that_is_built_on_stands_on_its_line(refused):
  files = {"own.yml": "tied: true\nlike: ./b.yml\n", "b.yml": OWN + "\n\nhumbug: 1\n"}
  (line,) = refused("decoder_block=own.yml", files=files)
  assert line.startswith("own.yml:2  humbug: no such part")


def test_families_differ_as_they_were_published(loaded):
  def blocks(name: str, layers: int = 6, *more: str):
    keys = (f"base_num_decoder_layers={layers}", "sliding_window_size=64", *more)
    return loaded(f"decoder_block={name}", *keys).decoder(259).blocks

  window = lambda name: [b.attention.window for b in blocks(name, 8)]
  assert window("gemma2") == [64, None] * 4
  assert window("gemma3") == [64] * 5 + [None] + [64] * 2
  assert window("olmo3") == [64, 64, 64, None] * 2
  assert window("mistral") == [64] * 8
  near, far = blocks("gemma3", 6, "rope_max_timescale=1000000", "rope_linear_scaling_factor=8")[4:]
  assert (near.attention.rope.max_timescale, near.attention.rope.factor) == (10_000, 1)
  assert (far.attention.rope.max_timescale, far.attention.rope.factor) == (1_000_000, 8)
  near, far = blocks("olmo3", 4, "rope_type=yarn", "rope_interleave=false")[2:]
  assert near.attention.rope.scaling is None and far.attention.rope.scaling.factor == 40
  for name, kind, pre, post in (
    ("gemma", "rms_plus_one", True, False),
    ("gemma2", "rms_plus_one", True, True),
    ("olmo2", "rms", False, True),
    ("qwen3", "rms", True, False),
  ):
    for block in blocks(name):
      assert (block.norm.kind, block.pre_norm, block.post_mlp_norm) == (kind, pre, post), name
      assert block.post_attention_norm == post
  biases = lambda name: (blocks(name)[0].attention.bias, blocks(name)[0].attention.out_bias)
  assert biases("qwen2") == (True, False) and biases("llama2") == (False, None)


def test_layer_pattern_takes_the_blocks_in_another_order(loaded, refused):
  keys = ("decoder_block=llama2", "sliding_window_size=8", "base_num_decoder_layers=5")
  spec = loaded(*keys, "layer_pattern=[full, layer]").decoder(259)
  assert [b.attention.window for b in spec.blocks] == [None, 8, None, 8, None]
  (line,) = refused(*keys, "layer_pattern=[fulll]")
  assert line.startswith(
    "command line  layer_pattern: 'fulll': no such block, did you mean 'full'?"
  )


def test_a_key_waits_beside_what_leaves_it_no_layer(loaded, refused):
  """As in a preset, or in the configuration that a run has written; not on top of it."""
  preset = "model_name=qwen3-30b-a3b"
  assert loaded(preset).architecture.base_mlp_dim == 6144
  assert loaded(preset, "first_num_dense_layers=1", "base_mlp_dim=64")
  own = {"run.yml": "decoder_block: mixtral\nbase_mlp_dim: 64\nbase_moe_mlp_dim: 32\n"}
  assert loaded("run.yml", files=own)
  (line,) = refused(preset, "base_mlp_dim=64")
  assert line.startswith("command line  base_mlp_dim: none of this model's layers uses it")


def test_blocks_may_take_the_place_of_those_of_the_pattern(loaded, refused):
  own = OWN.replace("pattern: [local, local, global]", "pattern: [local]\ninstead:\n")
  own += "  - {every: 3, local: global}\n  - {first: 1, local: global}\n"

  def windows(*argv: str, text: str = own) -> list[int | None]:
    keys = ("decoder_block=own.yml", "base_num_decoder_layers=7", *argv)
    spec = loaded(*keys, files={"own.yml": text}).decoder(259)
    return [b.attention.window for b in spec.blocks]

  assert windows() == [None, 16, None, 16, 16, None, 16]
  assert windows(text=own.replace("every: 3", "every: -1")) == [None, *[16] * 6]
  assert windows("layer_pattern=[local]") == [16] * 7
  for wrong, says in (
    ("{every: 3, local: globe}", "instead: 'globe': no such block, did you mean 'global'?"),
    ("{every: 3, first: 1, local: global}", "instead: is a list of changes such as {every: 4"),
    ("{every: often, local: global}", "instead.every: 'often' is not a whole number"),
  ):
    text = own.replace("{every: 3, local: global}", wrong)
    (line,) = refused("decoder_block=own.yml", files={"own.yml": text})
    assert line.startswith("own.yml:") and f"  {says}" in line


def test_layers_without_rotary_positions_come_at_their_interval(loaded, refused):
  def blocks(*argv: str):
    return loaded("decoder_block=llama4", "base_num_decoder_layers=4", *argv).decoder(259).blocks

  keys = ("nope_layer_interval=2", "chunk_attn_window_size=8", "use_qk_norm=true")
  near, far = blocks(*keys, "temperature_tuning=true")[:2]
  assert near.attention.rope and near.attention.chunk == 8 and near.attention.qk_norm.rotated
  assert far.attention.rope is far.attention.chunk is far.attention.qk_norm is None
  assert far.attention.temperature.floor_scale == 8192 and near.attention.temperature is None
  assert all(block.attention.rope for block in blocks())
  (line,) = refused("decoder_block=llama4", "nope_layer_interval=2", "layer_pattern=[layer]")
  assert "nope_layer_interval: has an effect only with layer_pattern=[]" in line


CUSTOM = """\
decoder_block: custom
blocks:
  near:
    attention: {heads: 4, kv_heads: 2, head_dim: 8, window: 8, rope: {max_timescale: 1e3}}
    mlp: {hidden: "${base_mlp_dim}", activations: [gelu]}
  far: {like: near, attention: {window: null, qk_norm: {kind: rms, eps: 1.0e-5}}}
pattern: [near, far]
"""


def test_a_run_may_define_its_own_blocks(loaded):
  config = loaded("run.yml", "base_mlp_dim=48", files={"run.yml": CUSTOM})
  near, far = config.decoder(259).blocks[:2]
  assert (near.attention.window, far.attention.window) == (8, None)
  assert near.mlp.hidden == 48 and far.attention.qk_norm == QkNormSpec("rms", 1e-5)
  again = loaded("config.yml", files={"config.yml": config.resolved()})
  assert again == config and again.decoder(259) == config.decoder(259)
  assert not again.changes(config.resolved())
  other = loaded(
    "run.yml", "base_mlp_dim=48", files={"run.yml": CUSTOM.replace("window: 8", "window: 9")}
  )
  assert "blocks" in [key for key, *_ in other.changes(config.resolved())]


def test_own_blocks_go_on_top_of_a_familys(loaded):
  own = "blocks={layer: {attention: {gate: true}}, tail: {like: layer, parallel: true}}"
  blocks = loaded("decoder_block=qwen2", own, "layer_pattern=[layer, tail]").decoder(259).blocks
  assert all(block.attention.gate and block.attention.out_bias is False for block in blocks)
  assert [block.parallel for block in blocks] == [False, True] * 2


def test_what_is_wrong_in_own_blocks_stands_where_it_is_written(refused):
  def lines(text: str, *argv: str) -> list[str]:
    return refused("run.yml", *argv, files={"run.yml": text})

  (line,) = lines(CUSTOM.replace("window: 8", "windw: 8"))
  assert line.startswith("run.yml:4  blocks.near.attention.windw: no such part, did you mean 'wind")
  (line,) = lines(CUSTOM.replace("[near, far]", "[near, fear]"))
  assert line.startswith("run.yml:7  pattern: 'fear': no such block, did you mean 'far'?")
  (line,) = lines("decoder_block: custom\n")
  assert line.startswith("configs/decoder_blocks/custom.yml") and "blocks: is missing" in line
  (line,) = lines("blocks: [near]\n")
  assert line.startswith("run.yml:1  blocks: is a list; write a mapping of names, as {near: {")
  (line,) = lines("", "blocks={layer: {mlp: {hiden: 8}}}")
  assert line.startswith(
    "command line  blocks.layer.mlp.hiden: no such part, did you mean 'hidden'"
  )
  (line,) = lines(CUSTOM, "mlp_bias=true")
  assert "mlp_bias: decoder block 'custom' does not use it" in line


def test_the_blocks_of_the_documentation_are_right(loaded):
  page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
  (own,) = re.findall(r"```yaml\n(# run\.yml.*?)```", page, re.DOTALL)
  near, far = loaded("run.yml", files={"run.yml": own}).decoder(259).blocks[:2]
  assert near.attention.sink and near.attention.window == 8 and near.attention.rope
  assert not far.attention.sink and far.attention.window is far.attention.rope is None
