"""What a disk, a copy or a hand can do to a file."""

import numpy as np


def mutated(content, random):
  """Bits flipped, bytes deleted, repeated, set or cut off, up to three times."""
  content = bytearray(content)
  used = np.flatnonzero(np.frombuffer(content, np.uint8))  # most of an ArrayRecord file is padding
  for _ in range(random.integers(1, 4)):
    at = min(int(random.choice(used)), len(content) - 1)
    size = int(random.choice([1, 4, 50]))
    how = random.integers(6)
    if how == 0:
      content[at] ^= 1 << random.integers(8)
    elif how == 1:
      content[at : at + size] = random.bytes(size)
    elif how == 2:
      del content[at : at + size]
    elif how == 3:
      content[at:at] = content[at : at + size]
    elif how == 4:
      content[at : at + 4] = int(random.choice([0, 2**31 - 1, 2**32 - 1])).to_bytes(4, "little")
    else:
      del content[at + 1 :]
    if not content:
      break
  return bytes(content)
