"""Random numbers that depend on where they are used and on nothing else.

A number is a hash of seed, tensor and place: whatever the cuts, threads or order of a merge, an
entry always meets the same one. The hash is the 32-bit "lowbias32" mixer (Wellons 2018,
https://nullprogram.com/blog/2018/07/31/) with a key before each of its two rounds.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def random16(stream: tuple[object, ...], offset: int, count: int) -> NDArray[np.uint16]:
    """Uniform whole numbers in [0, 65536) for elements offset… of a stream, [count].

    stream: what names it, such as (seed, key, member). A stream repeats after 2³³ elements.
    """
    keys = keys_of(stream)
    first = offset // 2  # each 32-bit number serves two elements
    x = np.arange((offset + count + 1) // 2 - first, dtype=np.uint32)
    shifted = np.empty_like(x)
    x += np.uint32(first % 2**32)
    x ^= keys[0]
    x ^= np.right_shift(x, 16, out=shifted)
    x *= np.uint32(0x7FEB352D)
    x ^= keys[1]
    x ^= np.right_shift(x, 15, out=shifted)
    x *= np.uint32(0x846CA68B)
    x ^= np.right_shift(x, 16, out=shifted)
    start = offset - 2 * first
    return x.view(np.uint16)[start:start + count]


def keys_of(stream: tuple[object, ...]) -> NDArray[np.uint32]:
    """The keys of the two rounds, [2]."""
    text = "\0".join(map(str, stream)).encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), np.uint32)


def uniform16(stream: tuple[object, ...], offset: int, count: int) -> Tensor:
    """Uniform multiples of 1/65536 in [0, 1) for elements offset… of a stream, float32 [count].

    stream: what names it, such as (seed, key, member); an entry meets the same number whatever the
    order, threads and cuts of a merge.
    """
    return torch.from_numpy(random16(stream, offset, count).astype(np.float32)).mul_(2.0**-16)
