"""Small real tokenizers of each kind, made by the libraries that they belong to."""

import base64
import functools
import io
import itertools
import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
  "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n\n",
  "The slings and arrows of outrageous fortune,\n  Or to take arms against a sea of troubles\r\n",
  "Größe, naïve café, 123 and 4567.\n",
]
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
  {% if message.role not in ["user", "assistant", "system"] %}
    {{ raise_exception("a role that is not known: " + message.role) }}
  {% endif %}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


def byte_level(vocab_size=400, special=("<s>", "<|end|>", "<|im_start|>", "<|im_end|>")):
  """As GPT-2 and those after it: bytes, merged within what a rule cuts."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(special),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(TEXTS * 3, trainer)
  return made


def byte_fallback(special=("<unk>", "<s>", "</s>")):
  """As Llama 2: characters, spaces as ▁, bytes for what is not known."""
  made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
    show_progress=False,
  )
  made.train_from_iterator(TEXTS * 3, trainer)
  written = json.loads(made.to_str())  # bytes are tokens of the model, and no special ones
  written["added_tokens"] = [t for t in written["added_tokens"] if t["content"] in special]
  return tokenizers.Tokenizer.from_str(json.dumps(written))


def pieces():
  """A unigram model, whose decoder drops the first space."""
  made = tokenizers.Tokenizer(models.Unigram())
  made.normalizer = normalizers.NFKC()
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.decoder = decoders.Metaspace()
  trainer = trainers.UnigramTrainer(
    vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
  )
  made.train_from_iterator(TEXTS * 3, trainer)
  return made


def words():
  """Whole words between spaces, with the spaces in front of full stops taken away."""
  made = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  special = ["[UNK]", "[BOS]", "[EOS]"]
  trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
  made.train_from_iterator(TEXTS * 3, trainer)
  return made


CHAT_CONFIG = {
  "bos_token": "<s>",
  "eos_token": "<|im_end|>",
  "pad_token": "<|end|>",
  "tokenizer_class": "PreTrainedTokenizerFast",
  "clean_up_tokenization_spaces": False,
}
FOLDERS = {
  "byte_level": (byte_level, CHAT_CONFIG | {"chat_template": TEMPLATE}),
  "byte_fallback": (
    byte_fallback,
    {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>"},
  ),
  "pieces": (pieces, {"eos_token": "</s>", "unk_token": "<unk>"}),
  "words": (words, {"bos_token": "[BOS]", "clean_up_tokenization_spaces": True}),
  "added": (  # special tokens that only tokenizer_config.json knows of
    byte_level,
    {
      "bos_token": "<s>",
      "eos_token": "<|im_end|>",
      "pad_token": "<|pad|>",
      "image_token": "<image>",
      "additional_special_tokens": ["<|im_start|>", "<|tool|>"],
      "added_tokens_decoder": {
        "379": {"content": "<think>", "special": False, "normalized": False},
        "380": {"content": "<a b>", "special": True, "lstrip": True, "normalized": False},
      },
    },
  ),
  "split": (byte_level, CHAT_CONFIG | {"split_special_tokens": True}),
}


@functools.cache
def _texts(kind):
  build, config = FOLDERS[kind]
  return build().to_str(), json.dumps(config)


def huggingface(folder: Path, kind="byte_level", **files) -> Path:
  """A folder with a tokenizer, and `files` beside it, `generation_config={...}` for a .json."""
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer, config = _texts(kind)
  (folder / "tokenizer.json").write_text(tokenizer)
  (folder / "tokenizer_config.json").write_text(config)
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


@functools.cache
def _sentencepiece(kind) -> bytes:
  made = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for text in TEXTS for line in text.splitlines() if line] * 3),
    model_writer=made,
    model_type=kind,
    vocab_size=320,
    byte_fallback=True,
    pad_id=3,
    minloglevel=2,
  )
  return made.getvalue()


def sentencepiece_model(folder: Path, kind="bpe") -> Path:
  (folder / "spiece.model").write_bytes(_sentencepiece(kind))
  return folder / "spiece.model"


def ranks(count=600, skip=()) -> dict[bytes, int]:
  """All bytes, then words of up to four letters, each made of those before it."""
  tokens = {bytes([byte]): None for byte in range(256)}
  letters = b"etaoinshrdlu bcfgkmpvwyETAOINSHRDLU"
  for word in itertools.product(letters, repeat=4):
    for length in (2, 3, 4):
      tokens[bytes(word[:length])] = None
    if len(tokens) >= count:
      break
  ids = (id for id in itertools.count() if id not in skip)
  return dict(zip(itertools.islice(tokens, count), ids))


def tiktoken_file(folder: Path, made: dict[bytes, int]) -> Path:
  lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in made.items())
  (folder / "ranks.tiktoken").write_bytes(b"".join(lines))
  return folder / "ranks.tiktoken"
