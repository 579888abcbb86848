"""Keys and values kept from token to token, with the mask over them.

A cache is of all layers of a block, carried through the scan over them and written in place:
`cache.at(layer).append(k, v, mask)` keeps new tokens of one layer, and answers with the cache, the
keys and values that are to be attended to (arrays, or Held, which `kernels.attend` reads), and the
mask over them. Layers may differ from block to block in their Size, and so do their caches.
"""

from maxtext.caches.decoder import Caches, empty, filled, kept, placed, reach
from maxtext.caches.dense import DenseCache, RingCache
from maxtext.caches.paged import Ledger, PagedCache
from maxtext.caches.prompt import PromptCache, bounded
from maxtext.caches.rows import RowCache
from maxtext.caches.slabs import Storage, axis_order
from maxtext.caches.state import StateCache
from maxtext.caches.store import Size

__all__ = [
  "Caches",
  "DenseCache",
  "Ledger",
  "PagedCache",
  "PromptCache",
  "RingCache",
  "RowCache",
  "Size",
  "StateCache",
  "Storage",
  "axis_order",
  "bounded",
  "empty",
  "filled",
  "kept",
  "placed",
  "reach",
]
