"""Uniform random numbers addressed by (seed, model, tensor, entry).

Counter-based (Philox, Salmon et al. 2011, as NumPy implements it): entry i has the same number whatever chunk, shard,
worker, rank or device asks for it, and no generator has a state to keep.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ctl_merge.deferred import Tensor, torch

PER_BLOCK = 8  # one Philox4x64 counter value gives four 64-bit words, that is eight of 32 bits


def uniform(seed: int, model: str, tensor: str, start: int, count: int) -> Tensor:
    """Entries [start, start + count) of the sequence, float32 in [0, 1) with 24 random bits each: (count,)."""
    first = start // PER_BLOCK
    skipped = start - first * PER_BLOCK
    # NumPy steps the counter before its first draw; starting one below makes block `first` come first.
    generator = np.random.Philox(key=key_of(seed, model, tensor), counter=(first - 1) % 2**256)
    blocks = -(-(skipped + count) // PER_BLOCK)
    words = generator.random_raw(4 * blocks).astype("<u8", copy=False).view("<u4")[skipped : skipped + count]
    return torch.from_numpy((words >> np.uint32(8)).astype(np.float32)).mul_(2.0**-24)


def key_of(seed: int, model: str, tensor: str) -> np.ndarray:
    """The key of the generator: two words of 64 bits."""
    digest = hashlib.sha256("\0".join((str(seed), model, tensor)).encode()).digest()
    return np.frombuffer(digest[:16], "<u8")
