"""Where the optimizer's state is kept when the hosts keep it. Needs libtpu, and no TPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from maxtext import config, program
from maxtext.errors import ConfigError

RUN = (
  "dataset_type=synthetic vocab_size=1024 base_emb_dim=256 base_num_decoder_layers=2 head_dim=64 "
  "base_num_query_heads=4 base_num_kv_heads=4 base_mlp_dim=512 max_target_length=256 "
  "per_device_batch_size=1 attention=dot_product"
).split()

COMPILE = """
  import json
  from jax.experimental import topologies
  from maxtext import config, program

  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices

  def compiled(offload):
    keys = [*RUN, f"optimizer_memory_host_offload={offload}"]
    built = program.build(config.load(keys, {}), devices)
    memory = built.step.lower(built.state, built.batch(4)).compile().memory_analysis()
    names = "argument_size", "host_argument_size", "output_size", "host_output_size", "peak_memory"
    return {name: getattr(memory, f"{name}_in_bytes") for name in names}

  print(json.dumps([compiled("false"), compiled("true")]))
"""


def test_devices_that_share_the_hosts_memory_refuse_it():
  loaded = config.load([*RUN, "hardware=cpu", "optimizer_memory_host_offload=true"], {})
  with pytest.raises(ConfigError, match="optimizer_memory_host_offload"):
    program.build(loaded)


def test_the_state_compiles_for_a_tpu_into_the_hosts_memory_before_and_after_a_step():
  pytest.importorskip("libtpu")
  environ = {
    **os.environ,
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  compiling = subprocess.run(
    [sys.executable, "-c", f"RUN = {RUN}\n{textwrap.dedent(COMPILE)}"],
    cwd=Path(__file__).parents[1],
    env=environ,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert compiling.returncode == 0, compiling.stderr[-2000:]
  near, far = json.loads(compiling.stdout.splitlines()[-1])
  moved = near["argument_size"] - far["argument_size"]
  assert moved == far["host_argument_size"] == far["host_output_size"] > near["argument_size"] / 2
  assert near["host_argument_size"] == 0
  assert near["output_size"] - far["output_size"] == moved
  assert far["peak_memory"] <= near["peak_memory"] + moved / 100
