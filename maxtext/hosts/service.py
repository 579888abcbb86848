"""JAX's coordination service as a board where processes leave notes for each other."""

from __future__ import annotations

from typing import Any

PATIENCE = 10_000  # milliseconds of one question; it is asked again until there is an answer


class Service:
  """The notes of all processes, by key, and which processes are alive."""

  def __init__(self, client: Any, count: int):
    self._client, self._everyone = client, list(range(count))

  def write(self, key: str, text: str) -> None:
    self._client.key_value_set(key, text, allow_overwrite=True)

  def delete(self, key: str) -> None:
    self._client.key_value_delete(key)

  def read(self, key: str) -> str:
    """The note at `key`, as soon as it is there."""
    while True:
      try:
        return self._client.blocking_key_value_get(key, PATIENCE)
      except RuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          raise

  def below(self, folder: str) -> dict[str, str]:
    """The notes whose keys begin with `folder`/, by what comes after it."""
    found = self._client.key_value_dir_get(f"{folder}/")
    return {key.removeprefix(f"{folder}/"): text for key, text in found}

  def missing(self) -> list[int]:
    """The processes that are dead or have left; asked by all others, it answers all at once."""
    alive = self._client.get_live_nodes(self._everyone)
    return [process for process in self._everyone if process not in alive]
