"""Tiny random models of transformers, and ours with the same weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file  # noqa: E402

from maxtext import config, sharding  # noqa: E402
from maxtext.checkpoints import hub  # noqa: E402
from maxtext.checkpoints.tables import Slot, slots  # noqa: E402
from maxtext.config.values import render  # noqa: E402
from maxtext.layers.blocks import Block  # noqa: E402
from maxtext.layers.decoder import Decoder  # noqa: E402
from maxtext.layers.merging import Plan  # noqa: E402
from maxtext.layers.params import Compute  # noqa: E402
from maxtext.masks import Mask  # noqa: E402
from maxtext.specs import DecoderSpec  # noqa: E402

LENGTH, SPLIT, VOCAB = 24, 14, 96
TOLERANCE = 2e-4  # of the spread of the logits
SIZES = {
  "hidden_size": 48,
  "intermediate_size": 80,
  "num_hidden_layers": 4,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "vocab_size": VOCAB,
  "max_position_embeddings": 64,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
MODELS = {"GPT2": "GPT2LMHeadModel"}
Weights = Mapping[str, np.ndarray]


def configuration(name: str, settings: Mapping[str, Any]) -> Any:
  """Theirs, of the family's class."""
  return getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**settings)


def plain(configured: Any) -> dict[str, Any]:
  """What its config.json says."""
  return json.loads(configured.to_json_string())


def twin(name: str, settings: Mapping[str, Any], seed: int = 0) -> Any:
  """The torch model, its weights drawn wide: small ones would make it almost linear."""
  described = configuration(name, settings)
  described._attn_implementation = "eager"
  described._experts_implementation = "eager"
  model = getattr(transformers, MODELS.get(name, f"{name}ForCausalLM"))(described).eval().float()
  draw = torch.Generator().manual_seed(seed)
  buffers = [(path, b) for path, b in model.named_buffers() if path in model.state_dict()]
  with torch.no_grad():
    for path, p in [*model.named_parameters(), *buffers]:
      p.copy_(torch.randn(p.shape, generator=draw) * (0.3 if p.ndim > 1 else 0.5))
      if p.ndim == 1 and path.endswith("weight") and "Gemma" not in name:
        p.add_(1)
  return model


def tensors_of(model: Any) -> dict[str, np.ndarray]:
  """The torch model's tensors as its files have them, whose names are not always the module's."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    return load_file(f"{folder}/model.safetensors")


@dataclasses.dataclass(frozen=True)
class Ours:
  """Our model: what it is, how it is put together, and its parameters by path."""

  spec: DecoderSpec
  plan: Plan
  params: dict[str, Any]
  slots: tuple[Slot, ...]

  @property
  def decoder(self) -> Decoder:
    return self.plan.merge(self.params)

  @functools.cached_property
  def layout(self) -> sharding.Layout:
    """One device, which holds all."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    rules = dict.fromkeys(config.load([], {}).mesh.logical_axis_rules, ())
    return sharding.Layout(mesh, sharding.Rules(rules))

  def tensors(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What these parameters, or what else has their shapes, are in a file of theirs."""
    return {slot.name: slot.join(_pieces(slot, params)) for slot in self.slots}


def ours(described: Mapping[str, Any], tensors: Weights, **more: Any) -> Ours:
  """Our model with these tensors, each of which is taken and can be given back to the bit; `more`
  keys are set besides.
  """
  argv = ["dataset_type=synthetic", "max_target_length=64"]
  argv += [f"{key}={render(value)}" for key, value in more.items()]
  with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / hub.CONFIG).write_text(json.dumps(described))
    loaded = config.load(argv, {}, purpose="decode", model=Path(folder))
  spec = loaded.decoder()
  plan = Plan.of(functools.partial(Decoder, spec, Compute(kernel="dot_product"), loaded.memory))
  shapes = {path: declared.shape for path, declared in plan.declared.items()}
  params = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
  left = dict(tensors)
  stages = [(len(stage.blocks), stage.repeat) for stage in spec.stages]
  found = tuple(slots(hub.family(described).table, shapes, stages))
  for slot in found:
    tensor = left.pop(slot.name)
    assert tensor.shape == slot.shape, slot.name
    for (path, index, _), piece in zip(slot.parts, slot.split(tensor), strict=True):
      params[path][... if index is None else index] = piece
    np.testing.assert_array_equal(slot.join(_pieces(slot, params)), tensor)
  assert not left, sorted(left)
  return Ours(spec, plan, {path: jnp.asarray(value) for path, value in params.items()}, found)


def _pieces(slot: Slot, params: Mapping[str, Any]) -> list[np.ndarray]:
  whole = [(np.asarray(params[path]), index) for path, index, _ in slot.parts]
  return [array if index is None else array[index] for array, index in whole]


def random_tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(3, VOCAB, (rows, length))


def logits(decoder: Decoder, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray):
  """Ours, of tokens at these places."""
  mask = Mask.of(jnp.asarray(positions), jnp.asarray(segments))
  return np.asarray(decoder(jnp.asarray(tokens), mask))


def expected(model: Any, tokens: np.ndarray, **more: np.ndarray) -> np.ndarray:
  """Theirs."""
  with torch.no_grad():
    given = {name: torch.tensor(value) for name, value in more.items()}
    return model(torch.tensor(tokens), **given).logits.numpy()


def hidden_states(decoder: Decoder, tokens: np.ndarray) -> list[np.ndarray]:
  """What goes into our first layer, comes out of each, and of the last norm."""
  states: list[np.ndarray] = []

  class Seen(Block):
    def __call__(self, x: jax.Array, *others: Any) -> Any:
      states.extend([] if states else [np.asarray(x)])
      y, *more = super().__call__(x, *others)
      states.append(np.asarray(y))
      return y, *more

  for stage in decoder.stages:  # layer by layer, and nothing is traced
    stage.memory = dataclasses.replace(stage.memory, scan_layers=False, remat_policy="none")
    for block in stage.blocks:
      block.__class__ = Seen
  row = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  last = decoder.hidden(jnp.asarray(tokens), Mask.of(row, jnp.ones_like(row)))[0]
  return [*states, np.asarray(last)]


def first_difference(decoder: Decoder, model: Any, tokens: np.ndarray) -> str:
  """Where ours first differs from theirs; of the last layer they tell only what the norm made."""
  with torch.no_grad():
    theirs = model(torch.tensor(tokens), output_hidden_states=True).hidden_states
  *mine, _, last = hidden_states(decoder, tokens)
  names = ["the embedding", *(f"layer {i}" for i in range(len(mine)))]
  names[len(mine)] += " or the last norm"
  for name, found, right in zip(names, [*mine, last], theirs, strict=True):
    if not np.abs(found - right.numpy()).max() < TOLERANCE * right.numpy().std():
      return name
  return "the unembedding"


def assert_equal(
  found: np.ndarray, right: np.ndarray, seen: Any = ..., where: Callable[[], str] = lambda: ""
) -> None:
  """Logits [b t v] of those places [b t] that are `seen`; `where` says what differs first."""
  off = np.abs(found - right)[seen].max() / right[seen].std()
  assert off < TOLERANCE, f"off by {off:.1e} of the spread{where()}"


def assert_twins(
  name: str, settings: Mapping[str, Any], seed: int = 0, packed: bool = True
) -> None:
  """Logits of whole rows, of rows that hold two documents, and of one with padding on its left."""
  model = twin(name, settings, seed)
  mine = ours(plain(model.config), tensors_of(model)).decoder
  tokens = random_tokens(seed=seed)
  row = np.broadcast_to(np.arange(LENGTH), tokens.shape)
  first = lambda: f", from {first_difference(mine, model, tokens)} on"
  found = logits(mine, tokens, row, np.ones_like(row))
  assert_equal(found, expected(model, tokens), where=first)
  if packed:
    places = np.where(row < SPLIT, row, row - SPLIT)
    found = logits(mine, tokens, places, 1 + (row >= SPLIT))
    apart = [expected(model, tokens[:, :SPLIT]), expected(model, tokens[:, SPLIT:])]
    assert_equal(found, np.concatenate(apart, axis=1))
    seen = np.stack([row[0] >= 7, row[0] >= 0])
    places = np.where(seen, row - np.array([[7], [0]]), 0)
    found = logits(mine, tokens, places, seen.astype(int))
    for i, start in enumerate((7, 0)):
      assert_equal(found[i : i + 1, start:], expected(model, tokens[i : i + 1, start:]))
