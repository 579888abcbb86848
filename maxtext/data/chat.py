"""A message put as a model was taught to be spoken to: the chat templates of Hugging Face."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping
from typing import Any

from maxtext.data.errors import brief
from maxtext.errors import ConfigError

KEY = "use_chat_template"


@dataclasses.dataclass(frozen=True)
class Chat:
  """A Jinja template, and the special tokens that it may name: bos_token, eos_token ..."""

  template: str
  tokens: Mapping[str, str]

  def __call__(self, message: str) -> str:
    """A user's message as the whole conversation, up to where the answer begins.

    The template is a stranger's program and runs in a sandbox, with text alone to look at. Raises
    ConfigError where it fails or refuses, or where Jinja is not installed.
    """
    _require_jinja()
    from jinja2.exceptions import TemplateError

    messages = [{"role": "user", "content": message}]
    try:
      return self._compiled.render(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **self.tokens
      )
    except TemplateError as error:
      raise ConfigError(KEY, f"the chat template refuses: {brief(error)}; leave it away") from None
    except Exception as error:  # a template can fail as any program can
      what = f"the chat template fails: {type(error).__name__}: {brief(error)}; leave it away"
      raise ConfigError(KEY, what) from None

  @functools.cached_property
  def _compiled(self) -> Any:
    return _environment().from_string(self.template)


def _require_jinja() -> None:
  """Raises ConfigError where Jinja is not installed, or as old as to have known ways out."""
  try:
    import jinja2
  except ImportError:
    problem = "the package jinja2 is not installed; pip install 'maxtext[hf]'"
    raise ConfigError(KEY, problem) from None
  if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
    problem = f"jinja2 {jinja2.__version__} has holes in its sandbox; pip install 'jinja2>=3.1.6'"
    raise ConfigError(KEY, problem)


def _environment() -> Any:
  """Jinja as the authors of chat templates expect it."""
  from jinja2 import ext, nodes
  from jinja2.exceptions import SecurityError, TemplateError
  from jinja2.sandbox import ImmutableSandboxedEnvironment
  from jinja2.utils import Namespace

  class Generation(ext.Extension):
    """`{% generation %}` marks what an assistant writes, and leaves no trace in the text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.Scope(body).set_lineno(line)

  def namespace(*args: Any, **attributes: Any) -> Namespace:
    made = Namespace(*args, **attributes)
    if any(str(name).startswith("_") for name in dict(*args, **attributes)):
      raise SecurityError("a namespace holds no names that begin with _")
    return made

  def refuse(message: str) -> None:
    raise TemplateError(message)

  def to_json(value: Any, **how: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **how})  # Jinja's own escapes for HTML

  made = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  made.filters["tojson"] = to_json
  made.globals |= {
    "raise_exception": refuse,
    "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    "namespace": namespace,
    "dict": lambda *args, **items: dict(*args, **items),
  }
  return made
