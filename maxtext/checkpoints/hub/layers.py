"""Which kind of block each layer is: layer_types of a config.json, and our layer_pattern."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from maxtext.checkpoints.hub.parts import Json, Keys
from maxtext.errors import CheckpointError

LOCAL, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Layers:
  """Kinds of layers by `names`, theirs -> ours, of a block file whose pattern is `own`.

  Where a file does not say, they are as `own`, or with the field `every` one in so many is the last
  of it and all others the first.
  """

  own: tuple[str, ...]
  names: Mapping[str, str]
  every: str = ""

  def read(self, config: Json) -> Keys:
    depth, kinds = config["num_hidden_layers"], config.get("layer_types")
    every = (config.get(self.every) if self.every else None) or len(self.own)
    own = [*[self.own[0]] * (every - 1), self.own[-1]] if self.every else self.own
    if kinds is None:
      return {"layer_pattern": cycle([own[i % len(own)] for i in range(depth)])}
    return {"layer_pattern": cycle([named(self.names, kind) for kind in kinds[:depth]])}

  def write(self, keys: Keys) -> Json:
    return {"layer_types": spelled(self.names, keys, self.own)}


@dataclasses.dataclass(frozen=True)
class OptionalWindow:
  """A window that use_sliding_window turns on, in all layers but the first max_window_layers or as
  layer_types say.
  """

  names: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {LOCAL: "layer", FULL: "full"}
  )

  def read(self, config: Json) -> Keys:
    window, first = config.get("sliding_window"), config["max_window_layers"]
    depth, kinds = config["num_hidden_layers"], config.get("layer_types")
    if not config.get("use_sliding_window") or window is None:
      return {}
    kinds = kinds or [FULL if i < first else LOCAL for i in range(depth)]
    if LOCAL not in kinds:
      return {}
    pattern = cycle([named(self.names, kind) for kind in kinds[:depth]])
    return {"sliding_window_size": window, "layer_pattern": pattern}

  def write(self, keys: Keys) -> Json:
    window = keys.get("sliding_window_size")
    kinds = spelled(self.names, keys, ("layer",))
    if window is None or LOCAL not in kinds:
      return {"use_sliding_window": False, "sliding_window": None}
    first = kinds.index(LOCAL)
    return {
      "use_sliding_window": True,
      "sliding_window": window,
      "max_window_layers": first,
      "layer_types": kinds,
    }


@dataclasses.dataclass(frozen=True)
class NopeLayers:
  """Layers with and without rotary positions, of the kind `near` or of full attention.

  Our blocks are `layer` and `full`, without rotary positions `nope` and `full_nope`. Where a file
  does not say, the last of every no_rope_layer_interval has none, and those layers are near that
  have some (`turning`) or have none. `reach` is our key of how far the near ones see.
  """

  near: str
  reach: str = "sliding_window_size"
  turning: bool = False

  def read(self, config: Json) -> Keys:
    depth, every = config["num_hidden_layers"], config["no_rope_layer_interval"]
    turns = config.get("no_rope_layers") or [(i + 1) % every for i in range(depth)]
    kinds = config.get("layer_types")
    if kinds is None:
      limited = self.turning or (config.get("use_sliding_window") and config.get("sliding_window"))
      kinds = [self.near if limited and bool(turn) is self.turning else FULL for turn in turns]
    names = {(kind, turn): name for name, (kind, turn) in self._names().items()}
    found = []
    for kind, turn in zip(kinds[:depth], turns):
      named(dict.fromkeys((self.near, FULL), ""), kind)
      found.append(names[kind, bool(turn)])
    return {"layer_pattern": cycle(found)}

  def write(self, keys: Keys) -> Json:
    depth, every = keys["base_num_decoder_layers"], keys.get("nope_layer_interval", -1)
    own = ["layer"]
    if every > 0:
      own = ["layer"] * (every - 1) + ["full_nope" if self.turning else "nope"]
    pattern = keys.get("layer_pattern") or own
    names = self._names()
    if unknown := [name for name in pattern if name not in names]:
      raise CheckpointError(f"layer_pattern: {unknown[0]!r} has no name in a config.json")
    layers = [names[pattern[i % len(pattern)]] for i in range(depth)]
    near = FULL if keys.get(self.reach) is None else self.near
    return {
      "layer_types": [near if kind == self.near else kind for kind, _ in layers],
      "no_rope_layers": [int(turn) for _, turn in layers],
    }

  def _names(self) -> dict[str, tuple[str, bool]]:
    return {
      "layer": (self.near, True),
      "full": (FULL, True),
      "nope": (self.near, False),
      "full_nope": (FULL, False),
    }


def named(names: Mapping[str, str], kind: str) -> str:
  """Our name of a kind of layer."""
  if kind not in names:
    raise CheckpointError(f"config.json: layer_types has {kind!r}, which is none of {list(names)}")
  return names[kind]


def spelled(names: Mapping[str, str], keys: Keys, own: Sequence[str]) -> list[str]:
  """layer_types of the pattern in `keys`, or of the block file's `own`."""
  pattern = list(keys.get("layer_pattern") or own)
  back = {ours: theirs for theirs, ours in names.items()}
  if unknown := [name for name in pattern if name not in back]:
    raise CheckpointError(f"layer_pattern: {unknown[0]!r} has no name in a config.json")
  depth = keys["base_num_decoder_layers"]
  return [back[pattern[i % len(pattern)]] for i in range(depth)]


def cycle(names: Sequence[str]) -> list[str]:
  """The shortest pattern that gives these names when it is cycled."""
  for length in range(1, len(names)):
    if all(name == names[i % length] for i, name in enumerate(names)):
      return list(names[:length])
  return list(names)
