"""The sections and base.yml say the same of every key."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from maxtext import config
from maxtext.config import documents, sources, tokenizer
from maxtext.config.architecture import MADE
from maxtext.config.decoder import ELSEWHERE, BlockFile
from maxtext.config.sections import HINTS, SECTION_OF, SECTIONS, hint_of
from maxtext.config.values import coerce, words
from maxtext.data import tokenizers
from maxtext.explain import meanings
from maxtext.kernels import options
from maxtext.layers import stacking

BASE = documents.PACKAGED / "base.yml"


def read(path: Path) -> dict[str, documents.Node]:
  problems: list[str] = []
  root = documents.read(path, lambda line, problem: problems.append(f"{path}:{line} {problem}"))
  assert not problems
  return root.entries


def test_base_yml_and_the_sections_have_the_same_keys_in_the_same_sections():
  written = {section: list(node.entries) for section, node in read(BASE).items()}
  assert {s: set(keys) for s, keys in written.items()} == {s: set(h) for s, h in HINTS.items()}
  assert list(written) == list(SECTIONS)


def test_a_key_belongs_to_one_section_and_no_section_is_called_like_a_key():
  fields = [f.name for section in SECTIONS.values() for f in dataclasses.fields(section)]
  assert len(fields) == len(set(fields)) == len(SECTION_OF)
  assert not set(fields) & set(SECTIONS)


def test_every_key_has_its_meaning_in_one_line():
  assert set(meanings()) == set(SECTION_OF)
  assert all(len(meaning) < 130 for meaning in meanings().values())


def test_every_default_is_of_its_type_and_stands_in_base_yml_alone():
  for section, node in read(BASE).items():
    for key, value in node.entries.items():
      coerce(hint_of(key), value)
    for field in dataclasses.fields(SECTIONS[section]):
      assert field.default is field.default_factory is dataclasses.MISSING


def test_the_byte_tokenizers_vocabulary_is_the_one_that_is_checked():
  assert tokenizer.BYTES == tokenizers.BYTES


def test_every_type_can_be_put_into_words():
  assert all(words(hint_of(key)) for key in SECTION_OF)


READERS = ("run", "loading", "config")  # of config/, which otherwise only checks


def test_every_key_is_read_somewhere():
  """A key that does nothing is a defect. Architecture keys are read by decoder block files."""
  house = documents.PACKAGED.parent / "maxtext"
  elsewhere = [p for p in house.rglob("*.py") if p.parent.name != "config"]
  names = {
    node.attr
    for path in [*elsewhere, *(house / "config" / f"{name}.py" for name in READERS)]
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Attribute)
  }
  blocks = "".join(p.read_text() for p in (documents.PACKAGED / "decoder_blocks").glob("*.yml"))
  names |= set(re.findall(r"\$\{(\w+)\}", blocks)) | ELSEWHERE
  names |= {key for made, keys in MADE.items() if made in names for key in keys}
  names |= {key for key in SECTION_OF if key.endswith("_parallelism")}  # read by mesh._key
  names |= {*options.KEYS.values(), options.CONTEXT}  # read by kernels.Options.of
  names |= {*stacking.TAGS}  # read by stacking.spared
  names |= {*sources.PRESETS, "override_logical_axis_rules", "log_config"}  # read while loading
  assert set(SECTION_OF) - names == set()


@pytest.mark.parametrize(
  "path", sorted(documents.PACKAGED.glob("models/*.yml")), ids=lambda p: p.stem
)
def test_a_preset_is_a_decoder_block_and_sizes_and_makes_a_model(path):
  keys = read(path)
  assert set(keys) <= set(HINTS["architecture"]) and "decoder_block" in keys
  loaded = config.load([f"model_name={path.stem}", "max_target_length=128"], {})
  spec = loaded.decoder(32_000)
  assert spec.depth == loaded.architecture.base_num_decoder_layers
  assert spec.width == loaded.architecture.base_emb_dim


def test_presets_have_the_parameters_that_they_are_named_for():
  """Billions of parameters in the matrices alone, by arithmetic."""
  for name, billions in (
    ("llama2-7b", 6.74),
    ("llama2-13b", 13.0),
    ("llama2-70b", 69.0),
    ("gpt3-6b", 6.7),
    ("gpt3-22b", 22.0),
    ("gpt3-175b", 175.0),
    ("gpt3-52k", 52e-6),
  ):
    spec = config.load([f"model_name={name}", "max_target_length=128"], {}).decoder()
    (stage,) = spec.stages
    (block,) = stage.blocks
    attention, mlp = block.attention, block.mlp
    heads = 2 * attention.heads + 2 * attention.kv_heads
    layer = spec.width * (heads * attention.head_dim + (len(mlp.activations) + 1) * mlp.hidden)
    table = spec.width * (spec.vocab * (1 if spec.tied else 2) + spec.positions)
    total = (layer * stage.repeat + table) / 1e9
    assert total == pytest.approx(billions, rel=0.03), name


def test_every_block_file_makes_a_decoder_from_the_defaults():
  for name in documents.names("decoder_blocks"):
    mine = "{layer: {attention: {heads: 2, kv_heads: 1, head_dim: 8}, mlp: {hidden: 8}}}"
    own = [f"blocks={mine}"] if name == "custom" else []
    spec = config.load([f"decoder_block={name}", *own], {}).decoder(259)
    assert spec.vocab == 259 and spec.depth == 4


def test_a_block_file_uses_architecture_keys_only():
  for path in (documents.PACKAGED / "decoder_blocks").glob("*.yml"):
    root = documents.Node(read(path))
    assert BlockFile(path.stem, path, root).uses <= set(HINTS["architecture"])
