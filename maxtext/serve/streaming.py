"""Text as it comes, token by token: never half a character."""

from __future__ import annotations

from collections.abc import Sequence

from maxtext.data.tokenizers import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST = 4  # bytes of a character


class TextStream:
  """What each further token adds to a text.

  A character whose bytes have not all arrived decodes to U+FFFD at the end, once or for each byte:
  it waits for the next token. Only a few tokens are decoded again each time, from where the text is
  known to be whole.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
    self._tokenizer = tokenizer
    self._ids = list(prompt)
    self._whole = len(self._ids)  # tokens up to which the text has been whole
    self._shown = len(tokenizer.decode(self._ids))  # characters of the text of _ids that are out

  def push(self, id: int) -> str:
    """The text that can be shown now that this token has come."""
    self._ids.append(id)
    text = self._tokenizer.decode(self._ids)
    safe = text[: len(text) - self._broken(text)]
    new = safe[self._shown :]
    self._shown = max(self._shown, len(safe))
    if safe == text and new:
      # Some decoders treat the first token apart, so one stretch of known text stays in front.
      self._ids, self._whole = self._ids[self._whole :], len(self._ids) - self._whole
      self._shown = len(self._tokenizer.decode(self._ids))
    return new

  def _broken(self, text: str) -> int:
    """How many U+FFFD at its end may still become a character.

    A few decoders give one for each byte of it, or of all bytes since the last token of characters.
    A text that was not whole for as many tokens as a character has bytes will not become so.
    """
    count = len(text) - len(text.rstrip(BROKEN))
    return count if len(self._ids) - self._whole < LONGEST else min(count, 1)

  def finish(self) -> str:
    """What was held back: U+FFFD for bytes that never became a character."""
    text = self._tokenizer.decode(self._ids)
    new, self._shown = text[self._shown :], len(text)
    return new
