"""The decode command, from its arguments to what it prints."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from maxtext import config, decode, program, resume
from maxtext.checkpoints.manager import Checkpoints, restore_parameters
from maxtext.data.corpus import open_corpus
from maxtext.data.tokenizers import ByteTokenizer
from maxtext.errors import UserError
from maxtext.masks import Mask
from maxtext.training.state import tree
from tests.data import vocabularies

ROOT = Path(__file__).parents[1]
SMALL = (
  "base_emb_dim=32 base_num_query_heads=4 base_num_kv_heads=2 base_mlp_dim=64 "
  "base_num_decoder_layers=1 dtype=float32 max_target_length=16 jax_cache_dir= "
  "ici_data_parallelism=8"
).split()
PROMPT = "Was Größe: "
NOW = ("prompt=Now", "decode_length=3")
_said = {}


def write(folder, keys, steps=(2,)):
  """A run's folder as training leaves it, with a fresh model in each step."""
  keys = [key for key in SMALL if key.split("=")[0] not in {k.split("=")[0] for k in keys}] + keys
  keys += [f"run_name={folder.name}", f"base_output_directory={folder.parent}"]
  tokenizer = open_corpus(config.load(keys, {}).data).tokenizer
  for step in steps:
    loaded = config.load([*keys, f"init_weights_seed={step}"], {})
    built = program.build(loaded, vocabulary=tokenizer.vocab_size)
    with contextlib.closing(Checkpoints(folder / "checkpoints", loaded.checkpoint)) as checkpoints:
      extra = {"config": loaded.resolved(), "facts": resume.facts(loaded, 8)}
      extra["data"] = {"tokenizer": tokenizer.digest}
      checkpoints.save(step, tree(built.init()), extra, force=True)
  (folder / "config.yml").write_text(loaded.resolved())
  tokenizer.save(folder)
  return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
  return write(tmp_path_factory.mktemp("runs") / "bytes", [], steps=(2, 4))


@pytest.fixture
def say(capfdbinary, monkeypatch):
  """say(*arguments) -> what the command prints, and what it reports."""

  def call(*words):
    capfdbinary.readouterr()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8"))
    assert decode.main(list(map(str, words))) == 0
    sys.stdout.flush()
    out, err = capfdbinary.readouterr()
    _said[words] = out.decode(), err.decode()
    return _said[words]

  return call


@pytest.fixture
def said(say):
  """As say, or what it said before: each call compiles two programs."""
  return lambda *words: _said.get(words) or say(*words)


def one_pass(step_folder, prompt, length):
  """What greedy decoding writes, by a pass over all tokens for each new one."""
  loaded = config.load([str(step_folder / "config.yml")], {})
  built = program.build(loaded, vocabulary=259)
  params = jax.device_get(restore_parameters(step_folder, built.state.params))
  ids = [1, *ByteTokenizer().encode(prompt)]
  positions = np.arange(len(ids) + length)[None]
  forward = jax.jit(lambda ids: built.plan.merge(params)(ids, Mask.of(positions)))
  for _ in range(length):
    padded = np.pad(ids, (0, positions.size - len(ids)))[None]
    logits = np.array(forward(padded)[0, len(ids) - 1])
    logits[[0, 1]] = logits[259:] = -np.inf
    ids.append(int(logits.argmax()))
  return ByteTokenizer().decode(ids)


def test_it_continues_the_prompt_with_the_newest_checkpoint(run, say):
  out, err = say(run, f"prompt={PROMPT}", "decode_length=12")
  assert out == one_pass(run / "checkpoints" / "4", PROMPT, 12) + "\n"
  assert f"step 3 of {run}, on 1 of 8 cpu devices\n" in err and "12 tokens in" in err


def test_a_run_may_be_named_in_any_way(run, said):
  text, _ = said(run, *NOW)
  assert said(run / "checkpoints", *NOW)[0] == text
  assert said(run / "config.yml", *NOW)[0] == text
  assert said(run / "checkpoints" / "2", *NOW)[0] != text


def test_a_damaged_checkpoint_is_passed_over(run, said, tmp_path):
  copy = shutil.copytree(run, tmp_path / "copy")
  file = max((copy / "checkpoints" / "4").rglob("*"), key=lambda path: path.stat().st_size)
  file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
  out, err = said(copy, *NOW)
  assert "checkpoints/4 is damaged" in err and f"step 1 of {copy}" in err
  assert out == said(run / "checkpoints" / "2", *NOW)[0]


def test_the_run_is_left_as_it_is(run, say):
  def look():
    files = sorted(path for path in run.rglob("*") if path.is_file())
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return files, digests, [path.stat().st_mtime_ns for path in sorted(run.rglob("*"))]

  before = look()
  say(run, *NOW)
  assert look() == before


def test_each_prompt_of_a_file_gets_what_it_would_get_alone(run, say, said, tmp_path, monkeypatch):
  monkeypatch.setattr(decode, "TOGETHER", 2)
  file = tmp_path / "prompts.txt"
  file.write_text(f"Now\n\n{PROMPT}\nThe winter of our discontent\n")
  out, err = say(run, f"prompts_file={file}", "decode_length=3")
  alone = [said(run, f"prompt={p}", "decode_length=3")[0] for p in ("Now", PROMPT)]
  assert out.startswith(f"--- 1 of 3\n{alone[0]}--- 2 of 3\n{alone[1]}--- 3 of 3\nThe winter of")
  assert "9 tokens in" in err


def test_a_file_of_prompts_goes_before_a_prompt_that_the_run_was_given(
  run, say, tmp_path, monkeypatch
):
  monkeypatch.setenv("M_PROMPT", PROMPT)
  file = tmp_path / "prompts.txt"
  file.write_text("Now\nNow\n")
  assert say(run, f"prompts_file={file}", "decode_length=3")[0].startswith("--- 1 of 2\nNow")


def test_a_mesh_that_is_typed_is_used(run, said):
  mesh = ("ici_tensor_parallelism=2", "ici_fsdp_parallelism=4", "ici_data_parallelism=1")
  out, err = said(run, *NOW, *mesh)
  assert "on 8 cpu devices (fsdp 4, tensor 2)" in err and out == said(run, *NOW)[0]


@pytest.mark.slow
def test_experts_that_are_split_write_the_same(say, tmp_path):
  run = write(tmp_path / "experts", ["decoder_block=mixtral", "num_experts=4"])
  keys, one = ("prompt=Now", "decode_length=8"), ("ici_data_parallelism=1",)
  plain = say(run, *keys)[0]
  expert = (*one, "ici_fsdp_parallelism=1", "ici_tensor_parallelism=2", "ici_expert_parallelism=4")
  assert say(run, *keys, *expert)[0] == plain
  assert say(run, *keys, *expert, "custom_mesh_and_rule=decode")[0] == plain
  assert say(run, *keys, *expert, "custom_mesh_and_rule=expert_as_context")[0] == plain


@pytest.mark.slow
def test_layers_in_stages_write_the_same(say, tmp_path):
  run = write(tmp_path / "stages", ["base_num_decoder_layers=4"])
  keys = ("prompt=Now", "decode_length=8")
  stages = ("ici_data_parallelism=1", "ici_fsdp_parallelism=4", "ici_pipeline_parallelism=2")
  assert say(run, *keys, *stages)[0] == say(run, *keys)[0]


def test_a_longer_text_than_in_training_is_remarked_on(run, said):
  assert "the model has seen" not in said(run, *NOW)[1]
  _, err = said(run, "prompt=Now", "decode_length=20")
  assert "a text has up to 24 tokens; the model has seen 16 at once in training\n" in err


def test_samples_follow_the_seed(run, say):
  keys = ("prompt=Now", "decode_length=12", "decode_sampling_strategy=nucleus")
  first = say(run, *keys)[0]
  assert say(run, *keys)[0] == first != say(run, *keys, "decode_seed=1")[0]


def test_a_trained_tokenizer_is_found_when_the_corpus_is_gone(say, tmp_path):
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  (corpus / "a.txt").write_text("to be or not to be " * 50)
  (corpus / "b.txt").write_text("that is the question " * 50)
  keys = ["tokenizer_type=bpe", "tokenizer_vocab_size=290", f"dataset_path={corpus}"]
  made = write(tmp_path / "bpe", [*keys, f"tokenizer_cache_dir={tmp_path / 'cache'}"])
  shutil.rmtree(corpus)
  shutil.rmtree(tmp_path / "cache")
  out, _ = say(made, "prompt=to be", "decode_length=4")
  assert out.startswith("to be") and len(out) > len("to be\n")
  (made / "tokenizer.json").unlink()
  assert refusal(made, "prompt=to be")[0] == 3
  corpus.mkdir()
  (corpus / "a.txt").write_text("another language altogether " * 50)
  code, line = refusal(made, "prompt=to be")
  assert code == 3 and "its tokenizer.json is gone, and its data give another tokenizer" in line


MADE = {
  "huggingface": lambda folder: vocabularies.huggingface(folder / "hf"),
  "sentencepiece": vocabularies.sentencepiece_model,
  "tiktoken": lambda folder: vocabularies.tiktoken_file(folder, vocabularies.ranks(600)),
}


@pytest.fixture(scope="module", params=MADE)
def foreign(request, tmp_path_factory):
  """A run with a tokenizer from a file, which is gone from where training had it."""
  folder = tmp_path_factory.mktemp("foreign")
  path = MADE[request.param](folder)
  keys = [f"tokenizer_type={request.param}", f"tokenizer_path={path}", "tokenizer_cache_dir="]
  (folder / "text.txt").write_text("to be or not to be " * 50)
  made = write(folder / "run", [*keys, f"dataset_path={folder / 'text.txt'}", "add_bos=false"])
  path.rename(folder / "elsewhere")
  return made, path, folder / "elsewhere"


def test_a_run_keeps_the_tokenizer_that_it_read_from_a_file(foreign, say):
  made, path, elsewhere = foreign
  first, _ = say(made, "prompt=to be", "decode_length=4")
  assert first.startswith("to be") and len(first) > len("to be\n")
  kept = sorted(file for file in made.iterdir() if file.name.startswith("tokenizer"))
  hidden = [file.rename(file.with_name(f"hidden-{file.name}")) for file in kept]
  assert refusal(made, "prompt=to be")[0] == 3
  elsewhere.rename(path)  # back where training had it
  again, said = say(made, "prompt=to be", "decode_length=4")
  assert again == first and "taking the tokenizer from where training had it" in said
  path.rename(elsewhere)
  for file, name in zip(hidden, kept):
    file.rename(name)


def test_a_tokenizer_that_was_changed_in_the_runs_folder_is_refused(foreign, tmp_path):
  made = shutil.copytree(foreign[0], tmp_path / "copy")
  other = tmp_path / "other"
  other.mkdir()
  if (made / "tokenizer.json").exists():
    vocabularies.byte_level(vocab_size=370).save(str(made / "tokenizer.json"))
  elif (made / "tokenizer.model").exists():
    vocabularies.sentencepiece_model(other, "unigram").rename(made / "tokenizer.model")
  else:
    vocabularies.tiktoken_file(other, vocabularies.ranks(590)).rename(made / "tokenizer.tiktoken")
  code, line = refusal(made, "prompt=to be")
  assert code == 3 and "is not the tokenizer that the model has learned" in line


def test_a_prompt_is_put_as_a_message_where_the_tokenizer_knows_how(say, tmp_path):
  path = vocabularies.huggingface(tmp_path / "hf", generation_config={"eos_token_id": [1, 3]})
  (tmp_path / "text.txt").write_text("to be or not to be " * 50)
  keys = ["tokenizer_type=huggingface", f"dataset_path={tmp_path / 'text.txt'}"]
  made = write(tmp_path / "run", [*keys, f"tokenizer_path={path}", "tokenizer_cache_dir="])
  plain, _ = say(made, "prompt=to be", "decode_length=6")
  told, _ = say(made, "prompt=to be", "decode_length=6", "use_chat_template=true")
  message = "<|im_start|>user\nto be<|im_end|>\n<|im_start|>assistant\n"
  want, _ = say(made, f"prompt={message}", "decode_length=6")  # bos goes before it, as in the chat
  assert plain.startswith("to be") and told == "to be\n" + want.removeprefix(message)
  refuses = TEMPLATE_THAT_REFUSES
  (made / "tokenizer_config.json").write_text(json.dumps(vocabularies.CHAT_CONFIG | refuses))
  code, line = refusal(made, "prompt=to be", "use_chat_template=true")
  assert code == 2 and line == "use_chat_template: the chat template refuses: no; leave it away"
  (made / "tokenizer_config.json").write_text(json.dumps(vocabularies.CHAT_CONFIG))
  code, line = refusal(made, "prompt=to be", "use_chat_template=true")
  assert (
    code == 2 and line == "use_chat_template: the tokenizer has no chat template; leave it away"
  )


TEMPLATE_THAT_REFUSES = {"chat_template": "{{ raise_exception('no') }}"}


def refusal(*words):
  with pytest.raises(UserError) as refused:
    decode.main(list(map(str, words)))
  return refused.value.exit_code, str(refused.value)


@pytest.mark.parametrize(
  "words, code, line",
  [
    (["RUN"], 2, "prompt: is empty; give a text to continue"),
    (["RUN", "prompt="], 2, "prompt: is empty; give a text to continue"),
    (["RUN", "prompts_file=gone.txt"], 2, "'gone.txt': no such file"),
    (["RUN", "prompts_file=empty.txt"], 2, "empty.txt is empty; write one prompt a line"),
    (["RUN", "prompts_file=binary.txt"], 2, "binary.txt cannot be read: it is not UTF-8 text"),
    (["RUN", "prompt=a", "prompts_file=empty.txt"], 2, "give one prompt, or a prompts_file"),
    (["RUN", "prompt=a", "decode_sampling_strategy=beam"], 2, "'beam' is not known (greedy, "),
    (["RUN", "prompt=a", "decode_lenght=3"], 2, "did you mean 'decode_length'?"),
    (["RUN", "prompt=a", "base_emb_dim=64"], 4, "checkpoints/4 is of another model: params/embedd"),
    (["RUN", "prompt=a", "ici_tensor_parallelism=3"], 2, "ici_tensor_parallelism: "),
    (["gone", "prompt=a"], 2, "'gone': no such file"),
    (["folder", "prompt=a"], 2, "folder has no config.yml; give a run's folder, as runs/NAME"),
    (["prompt=a"], 2, "run_name: is not set; add run_name=NAME, or give the run's folder"),
    (["run_name=gone", "prompt=a"], 4, "runs/gone: no such folder; train the run first"),
    (["new", "prompt=a"], 4, "new holds no complete checkpoint"),
  ],
)
def test_a_refusal_is_one_line_and_says_what_would_be_right(
  run, words, code, line, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  Path("empty.txt").write_text("\n \n")
  Path("binary.txt").write_bytes(b"\xff\xfe\x00")
  Path("folder").mkdir()
  Path("new", "checkpoints").mkdir(parents=True)
  Path("new", "config.yml").write_text("run_name: new\n")
  found, said = refusal(*(run if word == "RUN" else word for word in words))
  assert found == code and line in said and "\n" not in said and len(said) < 400


def test_no_text_is_begun_that_learned_positions_cannot_finish(tmp_path):
  keys = ["decoder_block=gpt3", "trainable_position_size=20", "base_num_kv_heads=4"]
  made = write(tmp_path / "learned", keys)
  code, line = refusal(made, "prompt=Now", "decode_length=17")
  assert code == 2 and "decode_length: 4 tokens of prompt and 17 new ones" in line
  assert line.endswith("20 learned positions; use at most 16")


def test_a_terminal_is_shown_control_characters_and_does_not_obey_them(monkeypatch):
  def printed(tty, encoding="utf-8"):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    out.isatty = lambda: tty
    monkeypatch.setattr(sys, "stdout", out)
    decode._show("a\x1b[31m\tb\r\x7f\x9bé\n")
    return out.buffer.getvalue().decode(encoding)

  assert printed(tty=True) == "a␛[31m\tb␍␡\N{REPLACEMENT CHARACTER}é\n"
  assert printed(tty=False) == "a\x1b[31m\tb\r\x7f\x9bé\n"
  assert printed(tty=False, encoding="ascii") == "a\x1b[31m\tb\r\x7f??\n"


def test_help_and_refusals_wait_for_no_import_of_jax():
  code = (
    "import sys; from maxtext import decode; decode.main(['absent.yml', '--help']); "
    "print('jax' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
  assert done.stdout.startswith("usage: python -m decode") and done.stdout.endswith("False\n")


def test_a_run_that_was_trained_can_be_read(tmp_path):
  """The two commands, as a user types them."""
  keys = [key for key in SMALL if not key.startswith("ici")]
  keys += ["run_name=mine", "steps=3", "eval_interval=3", "eval_steps=1", "per_device_batch_size=4"]
  environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

  def call(program, *words):
    command = [sys.executable, "-m", f"maxtext.{program}", *words]
    done = subprocess.run(command, capture_output=True, env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()

  call("train", *keys)
  out, err = call("decode", "runs/mine", f"prompt={PROMPT}", "decode_length=5")
  assert out.startswith(PROMPT) and "step 2 of runs/mine, on 1 cpu device" in err
