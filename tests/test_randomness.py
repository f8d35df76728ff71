"""Random numbers by place: the same however they are cut, and random."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from zoo.fusion.randomness import random16, uniform16
from zoo.fusion.rounding import rounded

N = 1 << 18


@pytest.mark.parametrize("cuts", [(0, N), (0, 1, 2, 5, 1000, 1001, N), (0, 99_999, N)])
def test_cuts_do_not_matter(cuts: tuple[int, ...]) -> None:
    whole = random16((0, "w"), 0, N)
    parts = [random16((0, "w"), start, stop - start) for start, stop in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_large_offsets_are_another_part_of_the_stream() -> None:
    assert not np.array_equal(random16((0, "w"), 1 << 32, 64), random16((0, "w"), 0, 64))


def test_numbers_are_uniform_and_independent() -> None:
    numbers = uniform16((0, "w"), 0, N).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.003)
    counts = torch.bincount((numbers * 256).long(), minlength=256).double()
    chi_square = ((counts - N / 256) ** 2 / (N / 256)).sum().item()
    assert 150 < chi_square < 380  # 255 degrees of freedom
    for other in (uniform16((1, "w"), 0, N), uniform16((0, "v"), 0, N),
                  uniform16((0, "w", 1), 0, N), numbers.roll(1), numbers.roll(2),
                  uniform16((0, "w"), N, N)):
        both = torch.corrcoef(torch.stack([numbers, other.double()]))
        assert abs(both[0, 1].item()) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_the_mean_and_takes_a_neighbour(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for value in (1.0001, -1.0001, 3e-6, -0.3, 1e-8, -1e-8, 0.0):
        values = torch.full((N,), value)
        result = rounded(values, dtype, "stochastic", (0, "w"), 0).float()
        found = result.unique()
        assert len(found) <= 2
        step = (found.max() - found.min()).item()
        assert result.mean().item() == pytest.approx(value, abs=max(4 * step / N**0.5, 1e-9))
        assert (rounded(values, dtype, "nearest", (0, "w"), 0).float() == found[:, None]).any()
    exact = torch.randn(999, generator=generator).to(dtype)
    assert torch.equal(rounded(exact.float(), dtype, "stochastic", (0, "w"), 0), exact)
    assert torch.equal(rounded(exact.float(), torch.float32, "stochastic", (0, "w"), 0),
                       exact.float())


def test_stochastic_rounding_stays_finite() -> None:
    largest = torch.full((4096,), 65519.0)  # rounds to float16's largest, 65504
    assert rounded(largest, torch.float16, "stochastic", (0, "w"), 0).isfinite().all()
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    result = rounded(special, torch.float16, "stochastic", (0, "w"), 0)
    assert torch.equal(result.nan_to_num(7.0, 8.0, -8.0), torch.tensor([8.0, -8.0, 7.0]).half())
