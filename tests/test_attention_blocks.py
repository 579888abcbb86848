"""What the compiler's schedules say of kernels' blocks: counted right, and never above the peak."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from maxtext.specs import AttentionSpec
from tests.chips import printed

ROOT = Path(__file__).parents[1]
SCHEDULE = """
LH: loop header
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 } /* Start region 7 */
   0x2   : > { %9 = sbr.rel (%p0) target = $region9 }
   0x3   : > { %v1 = vmov 0 } /* Start region 8 */
   0x4   : > { %v2 = vmov 0 } /* End region 8 */
   0x5 PF: > { %v3 = vld [vmem:[%s3]] } /* Start/End empty region 9 :: Start region 10 */
   0x6   : > { %10 = sbr.rel (%p1) target = $region12 }
   0x7   : > { %v4 = vmatmul.bf16 %v3
 a word that goes on } /* Start region 11 */
   0x8   : > { %11 = sbr.rel (%p2) target = $region13 }
   0x9   : > { %v5 = vmatmul.bf16 %v4 }
   0xa   : > { %v6 = vmatmul.bf16 %v4 } /* Start region 13 */
   0xb PF: > { %12 = dma.vmem_to_hbm %s4 } /* Start/End empty region 12 */
   0xc   : > { %13 = sbr.rel (%p3) target = $region14 }
   0xd   : > { %14 = dma.hbm_to_vmem %s5 }
   0xe PF: > { %15 = sbr.rel (!%p4) target = $region7 } /* Start/End empty region 14 */
   0xf   :  { %s9 = smov 0 }
"""


@pytest.fixture
def blocks(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "scripts"))
  return importlib.import_module("attention_blocks")


def test_a_step_is_what_always_runs_what_computes_and_what_ends_a_row(blocks):
  """A jump within another, or over a transfer, is no part of its own."""
  assert blocks.step_of(SCHEDULE) == blocks.Step(always=13 - 3 - 5, computing=5, ends=3)


@pytest.mark.parametrize("window", [None, 300, 1024])
def test_steps_are_those_in_which_something_is_seen(blocks, window):
  case = blocks.Case(AttentionSpec(4, 2, 64, window=window), 2048, "v5p", {})
  q, k = np.indices((2048, 2048))
  pairs = (k <= q) if window is None else (k <= q) & (k > q - window)
  seen = pairs.reshape(4, 512, 2, 1024).any((1, 3))
  np.testing.assert_array_equal(case.seen(512, 1024), seen)
  flops = 4 * 64 * pairs.sum()  # two products, two each
  assert case.least("forward") == pytest.approx(flops / 459e12 * 2 * 1.75e9)


COUNTED = """
import json, sys
sys.path.insert(0, "scripts")
import attention_blocks as ab
from maxtext.kernels.options import Blocks
from maxtext.specs import AttentionSpec
case = ab.Case(AttentionSpec(4, 2, 128, window=1024), 2048, "v5p", {})
with ab.schedules() as told:
  for kernel, fields in ab.FIELDS.items():
    for side in (512, 1024):
      blocks = Blocks(**dict.fromkeys(fields, side))
      step = case.step(kernel, blocks, told)
      print(json.dumps([step.computing, case.cycles(kernel, blocks, step), case.least(kernel)]))
  print(json.dumps(case.step("forward", Blocks(q=2048, kv=2048, kv_compute=2048), told)))
"""


def test_larger_blocks_take_as_many_cycles_more_and_none_is_above_the_peak():
  *counted, too_large = map(json.loads, printed(COUNTED))
  assert too_large is None
  for (small, *_), (large, *_) in zip(counted[::2], counted[1::2], strict=True):
    assert 3 < large / small < 5
  for _, cycles, least in counted:
    assert 0.1 < least / cycles < 1
