"""Compiled loops for large merges, where numba is: `pip install 'fusion-zoo[compiled]'`.

What they compute has the same bits without them. The first large merge on a machine compiles what
it needs, which takes some seconds, and keeps it; `ZOO_COMPILED=0` leaves them alone.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

# Elements of a merge from which on it pays to load them, which takes a third of a second.
WORTH = 1 << 27

# How many times larger pieces may be for the loops, which need no cache for a whole one.
WIDER = 4

_wanted = _used = False
_kernels: ModuleType | None = None
_failed = False


def expect(elements: int) -> None:
    """Say how many elements the merge has that begins."""
    global _wanted, _used
    _used = False
    _wanted = (elements >= WORTH or _kernels is not None) and os.environ.get("ZOO_COMPILED") != "0"


def used() -> bool:
    """Whether the merge that goes on has used them."""
    return _used


def kernels(*tensors: Tensor) -> ModuleType | None:
    """The module of kernels, if there is one, the merge is worth it, and these tensors are what it
    takes: float32 in memory, of one shape, that no gradient is wanted of."""
    global _used
    if _wanted and not _failed and all(
            tensor.dtype == torch.float32 and tensor.device.type == "cpu"
            and not tensor.requires_grad and tensor.is_contiguous()
            and tensor.shape == tensors[0].shape for tensor in tensors):
        found = _kernels or _load()
        _used = found is not None
        return found
    return None


def _load() -> ModuleType | None:
    global _kernels, _failed
    if importlib.util.find_spec("numba") is None:
        _failed = True
        return None
    try:
        from zoo.fusion import kernels
        _want_same_roundings(kernels)
    except (ImportError, RuntimeError) as error:  # a numpy that it does not know, nowhere to cache
        _failed = True
        warnings.warn(f"numba is installed and does not work, so merges run without it: {error}",
                      stacklevel=2)
    else:
        _kernels = kernels
    return _kernels


def _want_same_roundings(kernels: ModuleType) -> None:
    """Raises RuntimeError where PyTorch rounds a product before it adds it, as on processors that
    have no operation for both."""
    generator = torch.Generator().manual_seed(0)  # of 1037 some lie behind the last vector
    a, b, c = torch.randn(3, 1037, generator=generator, device="cpu", dtype=torch.float32)
    scale = torch.full_like(a, 0.3)
    for expected, by, factor in ((a.add(b, alpha=0.3), scale, 1.0),
                                 (a.addcmul(b, c, value=0.3), c, 0.3)):
        found = torch.empty_like(a)
        kernels.multiply_and_add(a.data_ptr(), b.data_ptr(), by.data_ptr(), len(a),
                                 np.float32(factor), found.data_ptr())
        if not torch.equal(found, expected):
            raise RuntimeError("PyTorch rounds otherwise on this processor")
