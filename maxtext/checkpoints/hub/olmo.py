"""OLMo 2 and 3."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.layers import Layers
from maxtext.checkpoints.hub.parts import ATTENTION_BIAS, SIZES, WINDOW, Act
from maxtext.checkpoints.hub.rotary import LocalRope, Rope
from maxtext.checkpoints.hub.tensors import DENSE_AROUND

DEFAULTS = {
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 2048,
  "tie_word_embeddings": False,
  "attention_bias": False,
}
OWN = (*SIZES, Act(), ATTENTION_BIAS)
KINDS = {"sliding_attention": "local", "full_attention": "full"}

FAMILIES = (
  Family("olmo2", "Olmo2ForCausalLM", "olmo2", DENSE_AROUND, (*OWN, Rope()), DEFAULTS),
  Family(
    "olmo3",
    "Olmo3ForCausalLM",
    "olmo3",
    DENSE_AROUND,
    (
      *OWN,
      WINDOW,
      Layers((*["local"] * 3, "full"), KINDS),
      LocalRope(500_000.0, 500_000.0),
    ),
    {**DEFAULTS, "sliding_window": 4096},
  ),
)
