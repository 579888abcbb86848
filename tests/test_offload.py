"""Where the optimizer's state is kept when the hosts keep it. Needs libtpu, and no TPU."""

from __future__ import annotations

import json
import textwrap

import pytest

from maxtext import config, program
from maxtext.errors import ConfigError
from tests.chips import printed

RUN = (
  "dataset_type=synthetic vocab_size=1024 base_emb_dim=256 base_num_decoder_layers=2 head_dim=64 "
  "base_num_query_heads=4 base_num_kv_heads=4 base_mlp_dim=512 max_target_length=256 "
  "per_device_batch_size=1 attention=dot_product"
).split()

COMPILE = """
  import json
  from jax.experimental import topologies
  from maxtext import config, estimate, program

  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices

  def compiled(*more):
    typed = {word.split("=")[0] for word in more}
    keys = [key for key in RUN if key.split("=")[0] not in typed]
    built = program.build(config.load([*keys, *more], {}), devices)
    batch = built.batch(built.config.training.global_batch(4))
    memory = built.step.lower(built.state, batch).compile().memory_analysis()
    names = "argument_size", "host_argument_size", "output_size", "host_output_size"
    names = *names, "host_temp_size", "peak_memory"
    found = {name: getattr(memory, f"{name}_in_bytes") for name in names}
    held = estimate.of_step(built)
    return found | {"host": held.host, "total": held.total}

  print(json.dumps([compiled(*keys.split()) for keys in CASES]))
"""


def compiled(*cases):
  """What steps with these settings have in either memory, as compiled for a TPU."""
  program = f"RUN, CASES = {RUN}, {cases}\n{textwrap.dedent(COMPILE)}"
  return json.loads(printed(program)[-1])


@pytest.mark.parametrize(
  "key", ["optimizer_memory_host_offload=true", "remat_policy=minimal_offloaded"]
)
def test_devices_that_share_the_hosts_memory_refuse_it(key):
  loaded = config.load([*RUN, "hardware=cpu", key], {})
  with pytest.raises(ConfigError, match=key.partition("=")[0]):
    program.build(loaded)


def test_the_state_compiles_for_a_tpu_into_the_hosts_memory_before_and_after_a_step():
  near, far = compiled("", "optimizer_memory_host_offload=true")
  moved = near["argument_size"] - far["argument_size"]
  assert moved == far["host_argument_size"] == far["host_output_size"] > near["argument_size"] / 2
  assert near["host_argument_size"] == 0
  assert near["output_size"] - far["output_size"] == moved
  assert far["peak_memory"] <= near["peak_memory"] + moved / 100
  assert moved / 2 < far["host"] <= moved  # of heads that are padded, a TPU has more


@pytest.mark.slow
def test_activations_compile_for_a_tpu_into_the_hosts_memory_as_many_as_are_estimated():
  custom = "custom decoder_layer_input=offload context=device mlpwi_0=offload"
  policies = "minimal", "minimal_offloaded", "qkv_proj_offloaded", custom
  rows = "per_device_batch_size=4 base_num_decoder_layers=4"
  found = compiled(*(f"{rows} remat_policy={policy}" for policy in policies))
  tokens, layers, width, mlp = 4 * 256, 4, 256, 512
  each = [0, 4 * width + 2 * mlp, 3 * width, width + mlp]  # of a token in a layer, kept in bfloat16
  assert [one["host_temp_size"] for one in found] == [2 * tokens * layers * n for n in each]
  for one in found:
    assert one["host"] == one["host_temp_size"]
    assert abs(one["total"] / one["peak_memory"] - 1) < 0.1
  assert found[1]["peak_memory"] < 0.7 * found[0]["peak_memory"]
