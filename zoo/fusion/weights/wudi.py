"""WUDI-Merging: Cheng et al. 2025, "Whoever started the interference should end it: guiding
data-free model merging via task vectors", arXiv:2503.08099."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.spectra import merged_matrices
from zoo.fusion.weights.task_arithmetic import wanted_base


def wudi(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    steps: int = 300,
    lr: float = 1e-5,
    scale: float = 1.0,
    split_qkv: bool = False,
) -> Tensor:
    """θ₀ + λτ with the τ that interferes least: it lowers Σ ‖(τ − τᵢ)τᵢᵀ‖² / ‖τᵢ‖².

    The rows of a linear layer's task vector span its inputs, so the loss stands for what τ changes
    in the outputs on the tasks' own inputs. Adam starts from Σ wᵢτᵢ, and few steps regularise: in
    directions that no task has used the loss is flat. Matrices are (out, in · height · width);
    task vectors that are no matrices are averaged (in the paper's experiments they are left out):
    biases, norms, depthwise kernels, embeddings.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member, which
    multiplies τᵢ. Returns float32 [*shape]. Raises OptionError for negative steps or lr.
    Cheng et al. 2025, arXiv:2503.08099.

    Options:
        steps: of Adam; 0 is the sum of the task vectors
        lr: Adam's, so the most that a step moves an entry; the paper's suits large networks
        scale: λ on the merged task vector
        split_qkv: treat query, key and value of a fused attention weight as three matrices; off,
            as one, as in the paper's experiments
    """
    if steps < 0 or lr < 0:
        raise OptionError("wudi", f"steps is {steps} and lr {lr}, expected 0 or more")
    start = widened(wanted_base("wudi", base))
    vectors = [(widened(tensor) - start) * share
               for tensor, share in zip(tensors, weight, strict=True)]
    merged = merged_matrices(partial(_merge, steps=steps, lr=lr), vectors, key,
                             split_qkv=split_qkv)
    return start.add(merged, alpha=scale)


def _merge(matrices: list[Tensor], steps: int, lr: float) -> Tensor:
    """matrices: one per member, each [m, n]."""
    start = torch.stack(matrices).sum(0)
    moved = [matrix for matrix in matrices if matrix.any()]
    if len(moved) < 2:
        return start  # nobody is interfered with
    # The loss is quadratic: with τ = Σ τⱼ + δ and Aᵢ = τᵢ / ‖τᵢ‖ its gradient is
    # 2(δ Σ AᵢᵀAᵢ + Σ (Σ τⱼ − τᵢ) AᵢᵀAᵢ), and what does not interfere stays exactly as it is.
    units = [matrix / matrix.norm() for matrix in moved]
    others = [torch.stack(moved[:place] + moved[place + 1:]).sum(0) for place in range(len(moved))]
    pull = torch.stack([other @ unit.mT @ unit
                        for other, unit in zip(others, units, strict=True)]).sum(0)
    stacked = torch.cat(units)  # (T · m, n)
    # Whichever multiplies less: through all rows, or by the Gram matrix of the columns.
    gram = None if 2 * len(stacked) < stacked.shape[1] else stacked.mT @ stacked
    away = torch.zeros_like(start)
    adam = torch.optim.Adam([away], lr=lr)
    for _ in range(steps):
        spread = away @ stacked.mT @ stacked if gram is None else away @ gram
        away.grad = 2 * (spread + pull)
        adam.step()
    return start + away.detach()
