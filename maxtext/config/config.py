"""The configuration of one run: its sections, and where each value comes from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from maxtext.config.decoder import BlockFile, spec
from maxtext.config.sections import HINTS, SECTION_OF, Sections, hint_of
from maxtext.config.sources import BASE, PRESET, Setting, defaults, of_text
from maxtext.config.values import Unfit, coerce, render
from maxtext.errors import ConfigError
from maxtext.hosts.sections import PLACE
from maxtext.specs import BlockSpec, DecoderSpec, MoeSpec

RULES = "logical_axis_rules"
SHAPING = (
  "architecture",
  "precision",
  "memory",
  "experts",
  "kernel",
  "training",
  "optimizer",
  "data",
)


@dataclasses.dataclass(frozen=True)
class Config(Sections):
  """All sections of a run; two are equal when their values are.

  `history` has every place that sets a key, in ascending precedence.
  """

  block: BlockFile = dataclasses.field(compare=False, repr=False)
  history: Mapping[str, tuple[Setting, ...]] = dataclasses.field(compare=False, repr=False)

  @functools.cached_property
  def sources(self) -> dict[str, Setting]:
    """For each key the place that counts: `config.sources["steps"].where`."""
    return {key: settings[-1] for key, settings in self.history.items()}

  @functools.cached_property
  def values(self) -> dict[str, Any]:
    """Every key with its value."""
    return {key: getattr(getattr(self, section), key) for key, section in SECTION_OF.items()}

  @property
  def preset_keys(self) -> list[str]:
    """The keys that presets set."""
    return [
      key for key, settings in self.history.items() if any(s.level == PRESET for s in settings)
    ]

  def differs(self, key: str) -> bool:
    """Whether something set the key to another value than its default."""
    first = self.history[key][0]
    return self.sources[key].level != BASE and self.values[key] != coerce(hint_of(key), first.node)

  @functools.cached_property
  def model(self) -> DecoderSpec | None:
    """The decoder, but for its vocabulary; None where it cannot be read."""
    return spec(self.block, self.architecture, 1)[0]

  @property
  def blocks(self) -> tuple[BlockSpec, ...] | None:
    """Every block of it."""
    return None if self.model is None else self.model.blocks

  @property
  def moes(self) -> list[MoeSpec] | None:
    """Every mixture of experts in it."""
    return None if self.blocks is None else [b.moe for b in self.blocks if b.moe is not None]

  def section_of(self, key: str) -> str:
    """The section that a key belongs to."""
    return SECTION_OF[key]

  def changed(self, **values: Any) -> Config:
    """The same with other values, by key; they are taken as they are."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
      sections.setdefault(SECTION_OF[key], {})[key] = value
    new = {name: dataclasses.replace(getattr(self, name), **v) for name, v in sections.items()}
    made = dataclasses.replace(self, **new)
    if "architecture" not in new:  # then the blocks are the same ones, and need not be read again
      vars(made)["model"] = self.model
    return made

  def report(self) -> Iterator[str]:
    """For the start of a run: what replaced its preset, and with `log_config` all that was set."""
    replaced = {}
    for key in self.preset_keys:
      given = next(s for s in self.history[key] if s.level == PRESET)
      if coerce(hint_of(key), given.node) != self.values[key]:
        replaced[key] = f" instead of {given.text} ({given.where})"
    for key, value in self.values.items():
      if key in replaced or (self.run.log_config and self.differs(key)):
        source = self.sources[key]
        text = source.text if key == RULES else render(value)
        yield f"config: {key}={text} ({source.where}){replaced.get(key, '')}"

  def hparams(self) -> dict[str, bool | int | float | str]:
    """What shapes the result, as single values by key."""
    single = (bool, int, float, str)
    keys = [key for section in SHAPING for key in HINTS[section]]
    return {k: v if isinstance(v := self.values[k], single) else render(v) for k in keys}

  def decoder(self, vocabulary: int | None = None) -> DecoderSpec:
    """The model; `vocabulary` counts where `vocab_size` is open."""
    size = self.architecture.vocab_size or vocabulary
    if size is None:
      raise ConfigError("vocab_size", "is open, and no tokenizer says its size; set vocab_size")
    made, problems = spec(self.block, self.architecture, size)
    if made is None:
      line, path, problem, _ = problems[0]
      raise ConfigError(f"{self.block.place}:{line}  {path}", problem)
    return made.cut(self.pipeline.pipeline_parallel_layers)

  def resolved(self) -> str:
    """Every value as YAML that loads again as this same configuration, but for this process's place
    among others: who reads it may be alone.
    """
    text = []
    for section, hints in HINTS.items():
      keys = [key for key in hints if key not in PLACE]
      text += [f"{section}:", *(f"  {key}: {render(self.values[key])}" for key in keys)]
    return "\n".join(text) + "\n"

  def changes(self, resolved: str) -> list[tuple[str, Any, Any]]:
    """(key, old, new) for each key that an earlier run's resolved configuration had otherwise.

    A key that is newer than that run had its default there. A value that can no longer be read is
    given as its text.
    """
    old = {s.key: s for s in [*defaults(), *of_text(resolved)]}
    before = {key: _value(setting) for key, setting in old.items()}
    now = {key: value for key, value in self.values.items() if key not in PLACE}
    changed = [(k, before[k], new) for k, new in now.items() if before[k] != new]
    return [(k, *_difference(old, new)) for k, old, new in changed]


def _difference(old: Any, new: Any) -> tuple[Any, Any]:
  """Of two mappings only the entries that differ."""
  if not isinstance(old, dict) or not isinstance(new, dict):
    return old, new
  names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
  return {n: old[n] for n in names if n in old}, {n: new[n] for n in names if n in new}


def _value(setting: Setting) -> Any:
  try:
    return coerce(hint_of(setting.key), setting.node)
  except Unfit:
    return setting.text
