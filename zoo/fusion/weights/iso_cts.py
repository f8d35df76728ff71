"""Iso-CTS: Marczak et al. 2025, "No task left behind: isotropic model merging with common and
task-specific subspaces", arXiv:2502.04959."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.spectra import merged_matrices, polar, side_by_side, singular
from zoo.fusion.weights.task_arithmetic import wanted_base


def iso_cts(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    common: float = 0.8,
    scale: float = 1.0,
    split_qkv: bool = False,
) -> Tensor:
    """Iso-C, with the smallest directions of the sum replaced by each task's own largest ones.

    The largest singular vectors of Σ wᵢτᵢ span what the tasks have in common; each task adds the
    largest ones of what it has outside of that. All directions are made orthogonal, and their
    singular values the mean of theirs. Matrices are (out, in · height · width); task vectors that
    are no matrices are averaged, as by `iso_c`.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. Returns
    float32 [*shape]. Raises OptionError for a common part outside [0, 1].
    Marczak et al. 2025, arXiv:2502.04959.

    Options:
        common: fraction of the directions that are common ones, in [0, 1]; what is left is shared
            out evenly among the tasks, and rounded to that
        scale: λ on the merged task vector; the paper chooses it on validation data
        split_qkv: treat query, key and value of a fused attention weight as three matrices; off,
            as one, as in the paper's experiments
    """
    if not 0 <= common <= 1:
        raise OptionError("iso_cts", f"common is {common}, expected a fraction in [0, 1]")
    start = widened(wanted_base("iso_cts", base))
    vectors = [(widened(tensor) - start) * share
               for tensor, share in zip(tensors, weight, strict=True)]
    merged = merged_matrices(partial(_merge, common=common), vectors, key, split_qkv=split_qkv)
    return start.add(merged, alpha=scale)


def _merge(matrices: list[Tensor], common: float) -> Tensor:
    """matrices: one per member, each [m, n]."""
    full, tasks = min(matrices[0].shape), len(matrices)
    own = min(round((full - int(full * common)) / tasks), full // tasks)
    factors = [singular(torch.stack(matrices).sum(0), full - own * tasks)]
    shared = factors[0][0]  # (m, R₀)
    factors += [singular(matrix - shared @ (shared.mT @ matrix), own) for matrix in matrices]
    left, values, right = side_by_side(factors)
    return values.sum() / max(len(values), 1) * (polar(left) @ polar(right))
