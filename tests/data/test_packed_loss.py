"""The loss of packed rows is that of the documents alone."""

import jax
import numpy as np
import pytest

from maxtext import config, program
from maxtext.data.pipeline import train_batches
from tests.data.cases import corpus_of, numbered, section

LENGTH = 32
KEYS = (
  "run_name=packed dtype=float32 vocab_size=320 base_emb_dim=32 base_num_query_heads=4 head_dim=8 "
  "base_num_kv_heads=2 base_mlp_dim=64 base_num_decoder_layers=2 per_device_batch_size=4 "
  f"max_target_length={LENGTH}"
).split()


@pytest.fixture(scope="module")
def measured():
  """packer -> summed loss and number of targets of the documents, by the program's evaluation."""
  built = program.build(config.load(KEYS, {}), jax.devices()[:1])
  params, evaluate = built.init().params, jax.jit(built.evaluate)
  tokens = numbered(np.random.default_rng(0).integers(2, LENGTH + 1, 14).tolist())

  def loss(packer):
    data = section(packer, enable_data_shuffling=False)
    found = [
      evaluate(params, batch)["loss"] for batch in train_batches(corpus_of(tokens), data, 4, LENGTH)
    ]
    return sum(float(each.total) for each in found), sum(float(each.weight) for each in found)

  return loss


@pytest.mark.parametrize("packer", ["first_fit", "best_fit"])
def test_the_loss_of_packed_documents_is_that_of_each_alone(measured, packer):
  """concat_then_split cuts documents, whose parts see less than the whole."""
  (total, weight), (alone, targets) = measured(packer), measured(None)
  assert weight == targets > 100
  np.testing.assert_allclose(total / weight, alone / targets, rtol=1e-5)
