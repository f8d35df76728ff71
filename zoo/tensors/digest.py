"""One hash of many tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(state: Mapping[str, Tensor]) -> str:
    """The sha256 of a state: of every name, dtype, shape and byte, in the order of the names."""
    running = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        running.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        running.update(tensor.flatten().view(torch.uint8).numpy().data)
    return running.hexdigest()
