"""Layers of multi-token prediction on the hub: taken along if asked for, else left out."""

from __future__ import annotations

import numpy as np

from maxtext import config, conversion
from maxtext.checkpoints import safetensors
from maxtext.checkpoints.hub.model import open_model
from maxtext.checkpoints.manager import Checkpoints
from maxtext.checkpoints.tables import Map, slots
from maxtext.program import build
from tests import twins
from tests.test_families import CASES
from tests.twins import transformers

OWN = {"eh_proj": (48, 96), "enorm": (48,), "hnorm": (48,), "shared_head.norm": (48,)}
COPIES = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}


def tensors(folder):
  return {name: tensor.read() for name, tensor in open_model(folder).tensors.items()}


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


def test_a_layer_of_multi_token_prediction_is_taken_if_asked_for_and_comes_back(tmp_path):
  twins.twin(*CASES["deepseek_v3, yarn, low rank, biases"]).save_pretrained(tmp_path / "hub")
  plain, random = tensors(tmp_path / "hub"), np.random.default_rng(0)
  draw = lambda shape: random.normal(size=shape).astype(np.float32)
  depth = open_model(tmp_path / "hub").keys["base_num_decoder_layers"]
  ahead, last = f"model.layers.{depth}.", f"model.layers.{depth - 1}."
  further = {
    ahead + name.removeprefix(last): draw(x.shape) for name, x in plain.items() if last in name
  }
  further |= {f"{ahead}{name}.weight": draw(shape) for name, shape in OWN.items()}
  copies = {f"{ahead}{name}.weight": plain[f"{of}.weight"] for name, of in COPIES.items()}
  every = {**plain, **further, **copies}
  shapes = {name: x.shape for name, x in every.items()}
  safetensors.write(
    tmp_path / "hub" / "model.safetensors",
    shapes,
    {name: x.dtype for name, x in every.items()},
    iter(every.values()),
  )
  for words, kept in (([], plain), (["mtp_num_layers=1"], {**plain, **further})):
    run, back = (tmp_path / f"{name}{len(words)}" for name in ("run", "back"))
    conversion.from_hf(tmp_path / "hub", run, words)
    conversion.to_hf(run, back)
    assert_same(tensors(back), kept)
  twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back1")
  np.testing.assert_array_equal(twin.state_dict()["lm_head.weight"], plain["lm_head.weight"])


def test_each_expert_of_such_a_layer_is_a_tensor_too():
  shapes = {"stages.0.blocks.0.moe.up.kernel": (2, 3, 4, 5), "mtp.0.moe.up.kernel": (3, 4, 5)}
  found = slots([Map("moe.up.kernel", "layers.{l}.{e}", "a b -> b a")], shapes, [(1, 2)])
  assert [slot.name for slot in found[-3:]] == ["layers.2.0", "layers.2.1", "layers.2.2"]
  assert found[4].parts == (("stages.0.blocks.0.moe.up.kernel", (1, 1), (4, 5)),)
  assert found[7].parts == (("mtp.0.moe.up.kernel", (1,), (4, 5)),) and found[7].shape == (5, 4)


def test_a_family_without_a_name_for_them_goes_without(tmp_path):
  words = "dataset_type=synthetic max_target_length=8 base_emb_dim=32 base_mlp_dim=32 vocab_size=64"
  loaded = config.load([*words.split(), "mtp_num_layers=1", "base_num_decoder_layers=1"], {})
  program = build(loaded)
  with Checkpoints(tmp_path / "run" / "checkpoints", loaded.checkpoint) as checkpoints:
    checkpoints.save(0, program.init(), {"config": loaded.resolved()}, force=True)
  conversion.to_hf(tmp_path / "run", tmp_path / "back")
  _, found = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "back", output_loading_info=True
  )
  assert not found["missing_keys"] and not found["unexpected_keys"]
