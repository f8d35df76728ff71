"""The k-th largest of values in pieces is the one that sorting finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.fusion import stream
from zoo.fusion.weights import selection
from zoo.fusion.weights.ranks import ranked
from zoo.fusion.weights.selection import Seen, at_places, at_places_of, divided, look

N = 200_000


def draw(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def misleading(seed: int) -> Tensor:
    """What the sample sees is nothing like the rest."""
    values = draw(seed)
    values[::selection.STRIDE] *= 1e-6
    return values


VALUES: dict[str, Callable[[int], Tensor]] = {
    "normal": draw,
    "magnitudes": lambda seed: draw(seed).abs(),
    "sorted": lambda seed: draw(seed).sort().values,
    "few values": lambda seed: draw(seed).bfloat16().float(),
    "halves": lambda seed: torch.where(draw(seed) > 0.7, draw(seed + 9), 0),
    "zeros": lambda seed: torch.zeros(N),
    "many scales": lambda seed: draw(seed) * 10 ** (12 * draw(seed + 9)),
    "infinite": lambda seed: draw(seed) / (draw(seed + 9) > 0),
    "misleading": misleading,
}


def seen_in(rows: Sequence[Tensor], places: selection.Places, piece: int) -> tuple[Seen, ...]:
    """All passes over rows that come in pieces."""
    measured: tuple[Seen, ...] = ()
    while True:
        whole: Seen | None = None
        for start in range(0, max(rows[0].numel(), 1), piece):
            part = look(lambda *parts: list(parts), [row[start:start + piece] for row in rows],
                        measured, places)
            if part is None:
                return measured
            whole = part if whole is None else whole + part
        assert whole
        measured = (*measured, whole)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("piece", [N, 70_001])
def test_the_places_are_those_of_sorting(kind: str, piece: int) -> None:
    rows = [VALUES[kind](seed) for seed in (1, 2)]

    def places(size: int, row: int) -> list[int]:
        return [1, size // 5, size // 5 + 1, size, size + 9, 0]

    measured = seen_in(rows, places, piece)
    assert len(measured) == (4 if kind == "misleading" else 2)
    expected = []
    for row in rows:
        descending = np.sort(row.numpy())[::-1]
        expected.append([float(value) for value in descending[[0, N // 5 - 1, N // 5, -1, -1]]])
    for found in (at_places(measured, places), at_places_of(rows, places)):
        assert [values[:5] for values in found] == expected
        assert all(values[5] == float("inf") for values in found)


def test_each_row_has_places_of_its_own() -> None:
    rows = [draw(1), draw(2)]

    def places(size: int, row: int) -> list[int]:
        return [size // (2 + 3 * row)]

    expected = [[float(row.sort(descending=True).values[N // part - 1])]
                for row, part in zip(rows, (2, 5), strict=True)]
    assert at_places(seen_in(rows, places, 70_001), places) == expected
    assert at_places_of(rows, places) == expected


def test_what_is_noted_stays_little() -> None:
    measured = seen_in([draw(1)], lambda size, row: [size // 5], 50_000)
    inside = sum(len(keys) for keys, _ in measured[1].tallies[0][0]._parts)
    assert 0 < inside < N / 8
    equal = seen_in([torch.full((N,), 3.0)], lambda size, row: [size // 5], 50_000)
    assert sum(len(keys) for keys, _ in equal[1].tallies[0][0]._parts) <= 4
    assert at_places(equal, lambda size, row: [size // 5]) == [[3.0]]


def test_nothing_has_no_places() -> None:
    assert at_places_of([torch.zeros(0)], lambda size, row: [1, 0]) == [[float("inf")] * 2]
    measured = seen_in([torch.zeros(0)], lambda size, row: [1], 10)
    assert at_places(measured, lambda size, row: [1]) == [[float("inf")]]


def test_a_second_selection_follows_the_first() -> None:
    def places(size: int, row: int) -> list[int]:
        return [size // 3]

    first, second = seen_in([draw(1)], places, N), seen_in([draw(2)], places, N)
    assert divided((), places) == ((), ())
    assert divided(first[:1], places) == (first[:1], ())
    assert divided((*first, *second), places) == (first, second)
    alone = look(lambda row: [row], [draw(3)], (), places, whole=True)
    assert alone is not None
    assert divided((alone, *second), places) == ((alone,), second)
    assert at_places((alone,), places) == at_places_of([draw(3)], places)


def test_small_tensors_reach_the_merge_whole() -> None:
    assert selection.SMALL <= stream.PIECE


@pytest.mark.parametrize("width", [1, 2, 7, 700, 5000])
def test_ranks_are_those_of_sorting(width: int) -> None:
    magnitudes = draw(1)[:width * 20].view(20, width).abs()
    exact = ranked(magnitudes, "exact")
    expected = magnitudes.argsort(dim=1, stable=True).argsort(dim=1) / max(width - 1, 1)
    assert torch.allclose(exact, expected if width > 1 else torch.full((20, 1), 0.5))


def test_binned_ranks_are_near_and_keep_the_mean() -> None:
    magnitudes = torch.stack([draw(seed)[:8192].abs() * 10**seed for seed in range(4)])
    magnitudes[0, ::2] = 0
    off = ranked(magnitudes, "binned") - ranked(magnitudes, "exact")
    assert off[1:].abs().max() < 0.03
    assert off.mean(1).abs().max() < 1e-6
    assert not torch.equal(ranked(magnitudes, "binned"), ranked(magnitudes, "exact"))
    assert ranked(torch.zeros(2, 4096), "binned").eq(0.5).all()


def test_ranks_of_nothing() -> None:
    for shape in ((0, 3), (1, 0)):
        for ranks in ("exact", "binned"):
            assert ranked(torch.zeros(shape), ranks).shape == shape
