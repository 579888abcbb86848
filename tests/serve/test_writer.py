"""Text in, text out."""

import functools

import jax
import pytest

from maxtext import config, program
from maxtext.data.tokenizers import ByteTokenizer
from maxtext.errors import ConfigError
from maxtext.serve.writer import Writer

SMALL = (
  "base_emb_dim=32 base_num_query_heads=4 base_num_kv_heads=2 base_mlp_dim=64 "
  "base_num_decoder_layers=1"
).split()


@functools.cache
def built():
  made = program.build(config.load(SMALL, {}), jax.devices()[:2], ByteTokenizer().vocab_size)
  return made, made.init().params


@functools.cache
def made(section, bos):
  return Writer(built()[0], ByteTokenizer(), section, bos)


@pytest.fixture
def writer(decode):
  return lambda bos=True: made(decode(decode_sampling_strategy="weighted"), bos)


def test_what_is_heard_is_what_is_returned(writer):
  heard = ["", ""]

  def hear(row, text):
    assert text
    heard[row - 4] += text

  texts, counts = writer()(built()[1], ["Ω", "To be"], 30, hear, first_row=4)
  assert texts == heard and all(0 < n <= 30 for n in counts)


def test_a_text_begins_as_documents_did_in_training(writer):
  assert writer().encode("ab") == [1, 100, 101] and writer(bos=False).encode("ab") == [100, 101]


def test_a_sample_is_the_same_each_time_and_follows_the_parameters(writer):
  sample, params = writer().again("The ", 24, "eval_sample_length"), built()[1]
  first = sample(params)
  assert first.startswith("The ") and sample(params) == first
  assert sample({**params, "unembedding": -params["unembedding"]}) != first


def test_a_sample_that_cannot_be_made_is_refused_at_once(writer):
  with pytest.raises(ConfigError, match="^prompt: "):
    writer(bos=False).again("", 24, "eval_sample_length")
