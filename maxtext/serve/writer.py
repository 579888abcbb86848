"""Text from a decoder, in and out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from maxtext.data.chat import Chat
from maxtext.data.tokenizers import Tokenizer
from maxtext.errors import ConfigError
from maxtext.layers.merging import Params
from maxtext.serve.engine import Engine, Parts
from maxtext.serve.sample import Sampler
from maxtext.serve.sections import Decode
from maxtext.serve.streaming import TextStream


def chat_of(tokenizer: Tokenizer, section: Decode) -> Chat | None:
  """How prompts become messages; None: they stay texts. Raises ConfigError without a template."""
  if not section.use_chat_template:
    return None
  if tokenizer.chat is None:
    raise ConfigError("use_chat_template", "the tokenizer has no chat template; leave it away")
  return tokenizer.chat


class Writer:
  """Continues texts: `writer(params, ["Once"], 64)` is a list of what comes after each."""

  def __init__(self, parts: Parts, tokenizer: Tokenizer, section: Decode, bos: bool):
    """With `bos`, a text begins with the token that began the documents in training; with
    `use_chat_template` it is a user's message, and the template says what it begins with.

    Raises ConfigError for a tokenizer without a chat template.
    """
    self.tokenizer, self._chat = tokenizer, chat_of(tokenizer, section)
    sampler = Sampler.of(section, tokenizer)
    self.engine = Engine(parts, sampler, tokenizer.stops, section.cache_quant)
    self._head = [tokenizer.bos] if bos and tokenizer.bos is not None else []

  @property
  def answers(self) -> bool:
    """Whether texts are messages, and what comes after them is the answer."""
    return self._chat is not None

  def encode(self, text: str) -> list[int]:
    """The ids that a text to be continued begins with. Raises ConfigError as chat templates do."""
    if self._chat is not None:
      return self.tokenizer.encode(self._chat(text))
    return [*self._head, *self.tokenizer.encode(text)]

  def __call__(
    self,
    params: Params,
    texts: Sequence[str],
    length: int,
    hear: Callable[[int, str], None] = lambda row, text: None,
    first_row: int = 0,
  ) -> tuple[list[str], list[int]]:
    """What comes after each text, and how many tokens that is, at most `length`.

    `hear(row, text)` gets whole characters as soon as they are there. Rows are numbered from
    `first_row`, see Engine.generate, whose ConfigErrors this raises.
    """
    prompts = [self.encode(text) for text in texts]
    streams = [TextStream(self.tokenizer, prompt) for prompt in prompts]
    out = [""] * len(prompts)

    def say(row: int, text: str) -> None:
      if text:
        out[row - first_row] += text
        hear(row, text)

    hear_id = lambda row, id: say(row, streams[row - first_row].push(id))
    ids = self.engine.generate(params, prompts, length, hear_id, first_row)
    for row, stream in enumerate(streams, first_row):
      say(row, stream.finish())
    return out, [*map(len, ids)]

  def compile(self, params: Params, texts: Sequence[str], length: int) -> None:
    """Compile what such texts need, once; of `params`, shapes and shardings are enough."""
    self.engine.compile(params, [self.encode(text) for text in texts], length)

  def check(self, texts: Sequence[str], length: int, where: str = "decode_length") -> int:
    """The most tokens that a text will have. Raises ConfigError at key `where` if it cannot be."""
    return self.engine.check([self.encode(text) for text in texts], length, where)

  def again(self, text: str, length: int, where: str) -> Callable[[Params], str]:
    """params -> `text` and what comes after it, for parameters that change.

    Raises ConfigError now, at the key `where` that `length` comes from, for what would fail then.
    """
    self.check([text], length, where)
    between = "\n" if self.answers else ""
    return lambda params: text + between + self(params, [text], length)[0][0]
