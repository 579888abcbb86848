"""Tokenizers of Hugging Face, beside transformers; chat templates."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import transformers
from transformers.utils import chat_template_utils

from maxtext.data import chat, huggingface
from maxtext.data.chat import Chat
from maxtext.errors import ConfigError, DataError
from tests.data import vocabularies

PARTS = "To be,fortune, ,  ,'s, ' , .,123,_,é,日本,👍🏽,\u0301,\u00a0,\u2028,ﬁ,▁,\r\n,\n,\t".split(
  ","
)
PARTS += (
  "<unk>,<s>,</s>,[BOS],<|im_end|>,<|end|>,<|tool|>,<|pad|>,<image>,<think>,<a b>, <a b> ".split(
    ","
  )
)


@pytest.fixture(scope="module", params=vocabularies.FOLDERS)
def pair(request, tmp_path_factory):
  """A tokenizer as we read it, and as transformers does."""
  folder = vocabularies.huggingface(tmp_path_factory.mktemp("made") / "it", request.param)
  return huggingface.load(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts():
  draw = random.Random(0)
  return ["".join(draw.choices(PARTS, k=draw.randrange(12))) for _ in range(300)]


def test_texts_have_the_ids_of_transformers(pair, texts):
  ours, theirs = pair
  want = theirs(texts, add_special_tokens=False)["input_ids"]
  assert [ours.encode(text) for text in texts] == want
  ids, lengths = ours.encode_all(texts)
  assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == want
  assert ours.vocab_size == len(theirs)


def test_ids_have_the_texts_of_transformers(pair, texts):
  ours, theirs = pair
  draw = random.Random(1)
  drawn = [draw.choices(range(ours.vocab_size), k=draw.randrange(9)) for _ in range(300)]
  for ids in [*drawn, *theirs(texts, add_special_tokens=False)["input_ids"]]:
    assert ours.decode(ids) == theirs.decode(ids)


def test_special_tokens_are_those_of_transformers(pair):
  ours, theirs = pair
  for role in ("bos", "eos", "pad"):
    if (id := getattr(theirs, f"{role}_token_id")) is not None:
      assert getattr(ours, role) == id
  assert ours.stops == (() if ours.eos is None else (ours.eos,))


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(pair, texts, tmp_path):
  ours, theirs = pair
  ours.save(tmp_path)
  again = huggingface.load(str(tmp_path))
  assert again.digest == ours.digest and again.chat == ours.chat and again.stops == ours.stops
  other = type(theirs).from_pretrained(tmp_path)
  assert other(texts, add_special_tokens=False) == theirs(texts, add_special_tokens=False)
  assert other.chat_template == theirs.chat_template


@pytest.mark.parametrize("message", ["What is it?", "  <|im_end|>\né ", ""])
def test_a_message_is_put_as_transformers_puts_it(tmp_path, message):
  folder = vocabularies.huggingface(tmp_path)
  ours, theirs = huggingface.load(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
  talk = [{"role": "user", "content": message}]
  want = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
  assert ours.encode(ours.chat(message)) == want
  assert ours.chat(message).endswith("<|im_start|>assistant\n")


def test_a_chat_template_file_goes_before_the_one_in_the_config(tmp_path):
  vocabularies.huggingface(tmp_path)
  (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}")
  assert huggingface.load(str(tmp_path)).chat("x") == "<|im_end|>x"


def test_of_several_chat_templates_the_default_is_taken(tmp_path):
  named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
  config = vocabularies.CHAT_CONFIG | {"chat_template": named}
  made = huggingface.load(str(vocabularies.huggingface(tmp_path, tokenizer_config=config)))
  assert made.chat("x") == "d"


@pytest.mark.parametrize(
  "template",
  [
    "{%- for m in messages %}{{ m.content }}{% if true %}{% break %}{% endif %}no{% endfor %}",
    "{{ messages | tojson }}{{ {'<': 'é'} | tojson(indent=2) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 7 %}{% endfor %}{{ ns.n }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %} and {{ unknown }}.",
    "  {% if add_generation_prompt %}\n  yes\n  {% endif %}\n{{ dict(a=1).a }}{{ tools }}",
  ],
)
def test_templates_mean_what_they_mean_in_transformers(template):
  talk = [{"role": "user", "content": "a <b> 'c' é"}]
  want, _ = chat_template_utils.render_jinja_template(
    [talk], chat_template=template, add_generation_prompt=True
  )
  assert Chat(template, {})(talk[0]["content"]) == want[0]


@pytest.mark.parametrize(
  "template, line",
  [
    ("{{ raise_exception('no\\nno') }}", "the chat template refuses: no; leave it away"),
    ("{% if %}", "the chat template refuses: Expected an expression"),
    ("{{ messages[3].content }}", "the chat template refuses: "),
    ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError"),
    ("{{ ''.__class__.__mro__ }}", "the chat template refuses: access to attribute '__class__'"),
    ("{{ messages.append(1) }}", "the chat template refuses: access to attribute 'append'"),
    ("{{ namespace(_a=1) }}", "the chat template refuses: a namespace holds no names"),
    (
      "{{ dict.__globals__['json'] }}",
      "the chat template refuses: access to attribute '__globals__'",
    ),
  ],
)
def test_a_template_that_fails_or_leaves_its_sandbox_is_refused_in_a_line(template, line):
  with pytest.raises(ConfigError) as refused:
    Chat(template, {})("x")
  assert str(refused.value).startswith(f"use_chat_template: {line}")
  assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_jinja_is_named_where_it_is_missing_or_too_old(monkeypatch):
  import jinja2

  monkeypatch.setattr(jinja2, "__version__", "3.1.5")
  with pytest.raises(ConfigError, match="3.1.5 has holes in its sandbox; pip install"):
    Chat("", {})("x")
  monkeypatch.setitem(sys.modules, "jinja2", None)
  with pytest.raises(ConfigError, match="jinja2 is not installed; pip install 'maxtext\\[hf\\]'"):
    chat.Chat("", {})("x")


@pytest.mark.parametrize("ids, stops", [(None, (3,)), (1, (3, 1)), ([2, 3, 1], (3, 2, 1))])
def test_texts_end_where_generation_config_says_too(tmp_path, ids, stops):
  folder = vocabularies.huggingface(tmp_path, generation_config={"eos_token_id": ids})
  made = huggingface.load(str(folder))
  assert (made.eos, made.stops) == (3, stops)
  made.save(tmp_path)
  assert huggingface.load(str(tmp_path)).stops == stops


def test_special_tokens_map_counts_where_the_config_lists_none(tmp_path):
  folder = vocabularies.huggingface(
    tmp_path, tokenizer_config={}, special_tokens_map={"bos_token": "<|end|>", "eos_token": "<s>"}
  )
  made = huggingface.load(str(folder))
  assert (made.bos, made.eos) == (1, 0)


CHANGES = {
  "eos_token": ("eos_token", "<|end|>", False),
  "more tokens": ("additional_special_tokens", ["To"], False),
  "split": ("split_special_tokens", True, False),
  "template": ("chat_template", "x", True),
  "length": ("model_max_length", 7, True),
}


@pytest.mark.parametrize("key, value, same", CHANGES.values(), ids=CHANGES)
def test_the_digest_changes_with_what_may_change_an_id(tmp_path, key, value, same):
  first = huggingface.load(str(vocabularies.huggingface(tmp_path))).digest
  config = vocabularies.FOLDERS["byte_level"][1] | {key: value}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  assert (huggingface.load(str(tmp_path)).digest == first) == same


def test_the_digest_changes_with_the_vocabulary(tmp_path):
  first = huggingface.load(str(vocabularies.huggingface(tmp_path))).digest
  other = vocabularies.byte_level(vocab_size=370)
  other.save(str(tmp_path / "tokenizer.json"))
  assert huggingface.load(str(tmp_path)).digest != first


BROKEN = {
  "empty": ("tokenizer.json", b"", "tokenizer.json: is empty; copy it again"),
  "cut": ("tokenizer.json", b'{"version": "1.0", "tru', "tokenizer.json: is cut short, or no file"),
  "pointer": (
    "tokenizer.json",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
    "tokenizer.json: is a Git LFS pointer, not the file itself; run `git lfs pull`",
  ),
  "config": ("tokenizer_config.json", b'{"bos', "tokenizer_config.json: is not JSON: "),
  "list": ("tokenizer_config.json", b"[]", "tokenizer_config.json: holds no JSON object"),
  "deep": ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: is not JSON: "),
  "role": ("tokenizer_config.json", b'{"bos_token": 3}', "tokenizer_config.json: names a special"),
  "template": ("chat_template.jinja", b"\xff", "chat_template.jinja: is not UTF-8 text"),
  "stops": (
    "generation_config.json",
    b'{"eos_token_id": "x"}',
    "eos_token_id is neither an id nor",
  ),
}


@pytest.mark.parametrize("name, content, line", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_in_a_line(tmp_path, name, content, line):
  vocabularies.huggingface(tmp_path)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError) as refused:
    huggingface.load(str(tmp_path))
  assert line in str(refused.value) and str(refused.value).startswith(str(tmp_path))
  assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_transformers_is_not_imported(tmp_path):
  code = (
    "import sys; from maxtext.data import huggingface\n"
    f"huggingface.load({str(vocabularies.huggingface(tmp_path))!r}).chat('x')\n"
    "print(*{'transformers', 'torch', 'jax', 'sentencepiece', 'tiktoken'} & set(sys.modules))"
  )
  environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
  assert (done.stdout, done.stderr) == ("\n", "")
