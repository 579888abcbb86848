"""Random numbers and orders: functions of a key alone, on every machine and in every version."""

from __future__ import annotations

import numpy as np


def mixed(x: np.ndarray) -> np.ndarray:
  """SplitMix64 (Steele, Lea, Flood 2014): uint64 -> uint64, one to one; each bit depends on all."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def noise(key: int, first: int, size: int) -> np.ndarray:
  """[size] uint64: numbers `first`, `first` + 1 ... of the sequence of `key`."""
  return mixed(np.arange(first, first + size, dtype=np.uint64) ^ mixed(np.array([key], np.uint64)))


def permutation(key: int, size: int) -> np.ndarray:
  """[size] int64: 0 .. size - 1 in the order of `key`.

  `grain.MapDataset.shuffle` keeps no table, but needs 30 ms a number for a corpus of two rows.
  """
  return np.argsort(noise(key, 0, size), kind="stable")
