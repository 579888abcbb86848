"""Presets have exactly the parameters that the published models have."""

from __future__ import annotations

import pytest

from maxtext import config, estimate

# The numbers of elements in the published checkpoints' files, a tied unembedding counted once. The
# Gemma 3 models above 1b are counted without their vision tower. gpt3 was never published; its
# sizes are those of the paper's table 2.1.
#
# Of those with experts, deepseek2 is counted in its checkpoint. The others are counted by hand from
# the shapes of their published configurations, since their files hold more (fp8 scales, layers that
# predict further tokens, a vision tower), and agree with what their authors round to: 671 B
# (DeepSeek-V3 2024, section 1), 1 T (Kimi K2), 20.91 B and 116.83 B (gpt-oss model card 2025, table
# 1), 109 B with vision (Llama 4 Scout).
PUBLISHED = {
  "llama2-7b": 6_738_415_616,
  "llama2-13b": 13_015_864_320,
  "llama2-70b": 68_976_648_192,
  "llama3.1-8b": 8_030_261_248,
  "llama3.1-70b": 70_553_706_496,
  "llama3.1-405b": 405_853_388_800,
  "llama3.2-1b": 1_235_814_400,
  "llama3.2-3b": 3_212_749_824,
  "llama3.3-70b": 70_553_706_496,
  "mistral-7b": 7_241_732_096,
  "gemma-2b": 2_506_172_416,
  "gemma-7b": 8_537_680_896,
  "gemma2-2b": 2_614_341_888,
  "gemma2-9b": 9_241_705_984,
  "gemma2-27b": 27_227_128_320,
  "gemma3-1b": 999_885_952,
  "gemma3-4b": 3_880_263_168,
  "gemma3-12b": 11_766_034_176,
  "gemma3-27b": 27_009_346_304,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-3b": 3_085_938_688,
  "qwen2.5-7b": 7_615_616_512,
  "qwen2.5-14b": 14_770_033_664,
  "qwen2.5-32b": 32_763_876_352,
  "qwen2.5-72b": 72_706_203_648,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
  "qwen3-next-80b-a3b": 79_674_391_296,
  "qwen3-30b-a3b": 30_532_122_624,
  "qwen3-235b-a22b": 235_093_634_560,
  "mixtral-8x7b": 46_702_792_704,
  "mixtral-8x22b": 140_620_634_112,
  "olmo2-7b": 7_298_617_344,
  "olmo2-13b": 13_716_198_400,
  "olmo2-32b": 32_234_279_936,
  "olmo3-7b": 7_298_011_136,
  "olmo3-32b": 32_233_522_176,
  "gpt2": 124_439_808,
  "gpt2-medium": 354_823_168,
  "gpt2-large": 774_030_080,
  "gpt2-xl": 1_557_611_200,
  "smollm2-135m": 134_515_008,
  "smollm2-360m": 361_821_120,
  "smollm2-1.7b": 1_711_376_384,
  "phi3-mini": 3_821_079_552,
  "deepseek2-16b": 15_706_484_224,
  "deepseek3-671b": 671_026_419_200,
  "kimi-k2-1t": 1_026_408_232_448,
  "gpt-oss-20b": 20_914_757_184,
  "gpt-oss-120b": 116_829_156_672,
  "llama4-17b-16e": 107_769_861_120,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_parameters(name):
  spec = config.load([f"model_name={name}"], {}).decoder()
  assert estimate.parameter_count(spec) == PUBLISHED[name]


def test_its_layer_of_multi_token_prediction_makes_up_the_rest_of_the_published_files():
  spec = config.load(["model_name=qwen3-next-80b-a3b", "mtp_num_layers=1"], {}).decoder()
  assert estimate.parameter_count(spec) == 81_324_862_720
