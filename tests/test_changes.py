"""What a run that goes on says to a decoder block file that is not the one it began with."""

from __future__ import annotations

import json

import pytest

from maxtext import config, resume
from maxtext.config import documents
from maxtext.errors import CheckpointError, ConfigErrors

LLAMA = (documents.PACKAGED / "decoder_blocks" / "llama2.yml").read_text()
KEYS = ("run_name=r", "base_num_decoder_layers=3")


@pytest.fixture
def own(tmp_path):
  """A decoder block file of one's own, as it was when the run began."""
  path = tmp_path / "own.yml"
  path.write_text(LLAMA)
  return path


def load(block, *keys):
  return config.load([f"decoder_block={block}", *KEYS, *keys], {})


def saved(loaded):
  """What a checkpoint of this run holds beside the state, as it is read back."""
  facts = json.loads(json.dumps(resume.facts(loaded, 1)))
  return {resume.CONFIG: loaded.resolved(), resume.FACTS: facts}


def refused(now, checkpoint):
  with pytest.raises(ConfigErrors) as caught:
    resume.check(now, checkpoint, 1)
  (line,) = caught.value.lines
  return line


def edit(path, old, new):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


def test_another_content_of_the_same_block_file_is_another_run(own):
  checkpoint = saved(load(own))
  edit(own, "tied: ${logits_via_embedding}", "tied: true")
  line = refused(load(own), checkpoint)
  assert line.startswith("decoder_block: ") and "resume_changes=[decoder_block]" in line
  assert "own.yml describes another model" in line and "tied: True here" in line
  resume.check(load(own, "resume_changes=[decoder_block]"), checkpoint, 1)


def test_a_block_file_that_says_the_same_in_other_words_or_place_is_the_same_run(own, tmp_path):
  checkpoint = saved(load(own))
  own.write_text(f"# as before\n{LLAMA}")
  resume.check(load(own), checkpoint, 1)
  moved = tmp_path / "moved.yml"
  own.rename(moved)
  resume.check(load(moved), checkpoint, 1)
  resume.check(load("llama2"), checkpoint, 1)


def test_a_changed_size_is_the_fault_of_its_key_and_not_of_the_block_file(own):
  line = refused(load(own, "base_mlp_dim=64"), saved(load(own)))
  assert line.startswith("base_mlp_dim: 64 here, 768 in the checkpoint")


def test_decoding_with_another_content_of_the_block_file_is_refused(own):
  checkpoint = saved(load(own))
  resume.check_model(load(own), checkpoint)
  edit(own, "embed_scale: ${embedding_multiplier}", "embed_scale: 2.0")
  with pytest.raises(CheckpointError) as caught:
    resume.check_model(load(own), checkpoint)
  line = str(caught.value)
  assert "own.yml describes another model" in line and "embed_scale: 2.0 here" in line
  assert "\n" not in line and len(line) < 400
