"""Methods that drop entries of task vectors, against their definitions entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.merging import merge_states
from zoo.fusion.randomness import random16, uniform16
from zoo.fusion.specs import SPECS
from zoo.fusion.weights.breadcrumbs import breadcrumbs
from zoo.fusion.weights.masks import even_mask, in_steps, mask
from zoo.fusion.weights.task_vectors import elected, trimmed, without_largest
from zoo.options import checked
from zoo.registry import load

Vector = NDArray[np.float64]
NAMED = {spec.name: spec for spec in SPECS}
WEIGHT = (1.0, 0.5, 2.0)
SHAPES = {"conv.weight": (20, 6, 3, 3), "depthwise": (40, 1, 3, 3), "matrix": (30, 50),
          "cls": (1, 1, 30), "bias": (30,), "scalar": (), "none": (0, 3)}
METHODS = ["dare_linear", "dare_ties", "della_linear", "della", "breadcrumbs", "breadcrumbs_ties"]


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


STATES, BASE = [state(seed) for seed in (1, 2, 3)], state(9)


def merge(name: str, *, seed: int = 5, weight: Sequence[float] = WEIGHT, **options: Any) -> Any:
    spec = NAMED[name]
    return merge_states(STATES, load(spec), spec=spec, base=BASE, weight=list(weight), seed=seed,
                        options=checked(spec, options))


def changes(key: str) -> list[Vector]:
    return [(one[key] - BASE[key]).double().numpy() for one in STATES]


def chosen(vectors: Sequence[Vector], weight: Sequence[float], normalise: bool) -> Vector:
    """TIES' election and disjoint merge, entry by entry."""
    merged = np.zeros(vectors[0].size)
    votes = [(w * vector.ravel(), w) for w, vector in zip(weight, vectors, strict=True)]
    for entry in range(merged.size):
        sign = 1 if sum(vote[entry] for vote, _ in votes) >= 0 else -1
        agreeing = [(vote[entry], w) for vote, w in votes if vote[entry] * sign > 0]
        if agreeing:
            merged[entry] = sum(vote for vote, _ in agreeing)
            merged[entry] /= sum(w for _, w in agreeing) if normalise else 1
    return merged.reshape(vectors[0].shape)


def combined(name: str, vectors: Sequence[Vector], normalise: bool) -> Vector:
    if name.endswith("linear") or name == "breadcrumbs":
        whole: Vector = np.tensordot(np.array(WEIGHT), np.array(vectors), 1)
        return whole
    return chosen(vectors, WEIGHT, normalise)


def close(found: Tensor, key: str, change: Vector) -> None:
    np.testing.assert_allclose(found.double().numpy(), BASE[key].double().numpy() + change,
                               rtol=1e-5, atol=2e-6, err_msg=key)


def uniform(key: str, member: int) -> Vector:
    shape = SHAPES[key]
    numbers = uniform16((5, key, member), 0, int(np.prod(shape)))
    return (numbers.double().numpy() + 2**-17).reshape(shape)


def l1_kept(vector: Vector, kept: Vector) -> Vector:
    masked = vector * kept
    whole, left = np.abs(vector).sum(), np.abs(masked).sum()
    return masked * (whole / left if left else 1)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("convention", ["paper", "mergekit"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_against_its_definition(name: str, convention: str, rescale: bool) -> None:
    density = 0.25
    merged = merge(name, density=density, scale=0.7, convention=convention, rescale=rescale)
    for key in SHAPES:
        vectors = []
        for member, vector in enumerate(changes(key)):
            kept = (uniform(key, member) < density).astype(float)
            by = 1 / density if rescale else 1
            vectors.append(l1_kept(vector, kept) if convention == "mergekit" and rescale
                           else vector * kept * by)
        close(merged[key], key, 0.7 * combined(name, vectors, convention == "paper"))


def rows_of(key: str, convention: str) -> list[NDArray[np.int64]]:
    """The places of each row in a flat tensor."""
    shape = SHAPES[key]
    places = np.arange(int(np.prod(shape))).reshape(shape)
    if len(shape) < 2:
        return [places.ravel()]
    if convention == "paper":
        return list(places.reshape(shape[0], -1)) if places.size else []
    return list(np.moveaxis(places, 1, -1).reshape(-1, shape[1])) if places.size else []


@pytest.mark.parametrize("name", ["della_linear", "della"])
@pytest.mark.parametrize("convention", ["paper", "mergekit"])
def test_della_against_its_definition(name: str, convention: str) -> None:
    density, epsilon = 0.4, 0.3
    merged = merge(name, density=density, epsilon=epsilon, scale=0.7, convention=convention)
    for key in SHAPES:
        vectors = []
        for member, vector in enumerate(changes(key)):
            chances = np.empty(vector.size)
            for row in rows_of(key, convention):
                order = np.abs(vector.ravel()[row]).argsort(kind="stable").argsort()
                ranks = order / (len(row) - 1) if len(row) > 1 else 0.5
                chances[row] = density - epsilon + 2 * epsilon * ranks
            chances = chances.reshape(vector.shape)
            kept = (uniform(key, member) < chances).astype(float)
            vectors.append(l1_kept(vector, kept) if convention == "mergekit"
                           else vector * kept / chances)
        close(merged[key], key, 0.7 * combined(name, vectors, normalise=True))


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (0.15, 0.0), (0.95, 0.2), (1.0, 0.1)])
def test_breadcrumbs_against_its_definition(name: str, density: float, gamma: float) -> None:
    merged = merge(name, density=density, gamma=gamma, scale=0.7)
    for key in SHAPES:
        vectors = []
        for vector in changes(key):
            size = vector.size
            keep, largest = int(density * size), int(gamma * size)
            first = max(0, size - keep - largest)
            stay = np.abs(vector.ravel()).argsort(kind="stable")[first:first + keep]
            kept = np.zeros(size)
            kept[stay if density < 1 else slice(None)] = 1
            vectors.append(vector * kept.reshape(vector.shape))
        close(merged[key], key, 0.7 * combined(name, vectors, normalise=False))


@pytest.mark.parametrize("name", METHODS)
def test_density_one_is_plain(name: str) -> None:
    if name.endswith("linear") or name == "breadcrumbs":
        plain, merged = merge("task_arithmetic"), merge(name, density=1.0)
    else:
        plain, merged = merge("ties", density=1.0), merge(name, density=1.0, normalise=True)
    for key in SHAPES:
        torch.testing.assert_close(merged[key], plain[key])


@pytest.mark.parametrize("name", METHODS)
def test_a_density_is_wanted(name: str) -> None:
    for density in (0.0, 1.5):
        with pytest.raises(OptionError, match=rf"{name}: density is {density}, expected "
                                              "a fraction"):
            merge(name, density=density)


def test_what_else_is_refused() -> None:
    with pytest.raises(OptionError, match=r"breadcrumbs: gamma is 1.0, exp"):
        merge("breadcrumbs", gamma=1.0)
    for epsilon in (0.3, 0.8):
        with pytest.raises(OptionError, match=rf"della: density ± epsilon is 0.2 ± {epsilon}, e"):
            merge("della", density=0.2, epsilon=epsilon)
    for name in ("dare_linear", "della_linear", "breadcrumbs"):
        with pytest.raises(OptionError, match=rf"{name}: the weights .* sum to zero; set"):
            merge(name, normalise=True, weight=[1.0, -2.0, 1.0])


def test_random_methods_follow_the_seed_and_the_members_place() -> None:
    for name in ("dare_linear", "della"):
        first = merge(name)["matrix"]
        assert not torch.equal(first, merge(name, seed=6)["matrix"])
        assert not torch.equal(first, merge(name, weight=(1.0, 1.0, 1.0))["matrix"])
        spec = NAMED[name]
        assert not spec.symmetric
        turned = merge_states(STATES[::-1], load(spec), spec=spec, base=BASE, seed=5,
                              weight=list(WEIGHT[::-1]), options=checked(spec, {}))["matrix"]
        assert not torch.allclose(turned, first)


def test_dropping_keeps_the_mean() -> None:
    """Over many seeds each entry comes out as it went in."""
    spec = NAMED["dare_linear"]
    base, one = {"w": torch.zeros(50)}, {"w": torch.linspace(-2, 2, 50)}
    for name, options in (("dare_linear", {"density": 0.3}), ("della_linear", {"density": 0.3})):
        spec = NAMED[name]
        results = torch.stack([
            merge_states([one], load(spec), spec=spec, base=base, seed=seed,
                         options=checked(spec, options))["w"] for seed in range(2000)])
        torch.testing.assert_close(results.mean(0), one["w"], rtol=0, atol=0.25)


def test_masks_have_their_probability_and_nothing_in_common() -> None:
    like = torch.empty(1 << 18)
    for density in (0.1, 0.5, 0.9, 1e-4):
        kept = even_mask(in_steps(density), (0, "w", 0), 0, like)
        assert set(kept.unique().tolist()) <= {0.0, 1.0}
        sigma = (density * (1 - density) / len(like)) ** 0.5
        assert kept.mean().item() == pytest.approx(in_steps(density), abs=5 * sigma)
    first = even_mask(0.5, (0, "w", 0), 0, like)
    others = [even_mask(0.5, stream, 0, like)
              for stream in ((0, "w", 1), (0, "v", 0), (1, "w", 0), (0, "w", 0, 0))]
    for other in (*others, first.roll(1), first.roll(2)):
        assert torch.corrcoef(torch.stack([first, other]))[0, 1].abs() < 0.01
    assert in_steps(1e-9) == 2**-16
    assert even_mask(1.0, (0, "w", 0), 0, like).eq(1).all()


def test_masks_do_not_depend_on_cuts() -> None:
    whole = even_mask(0.3, (0, "w", 2), 0, torch.empty(1000))
    parts = [even_mask(0.3, (0, "w", 2), start, torch.empty(stop - start))
             for start, stop in ((0, 1), (1, 334), (334, 1000))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(mask(torch.full((1000,), 0.3), (0, "w", 2), 0), whole)
    chances = torch.linspace(0, 1, 1000)
    assert torch.equal(mask(chances, (0, "w"), 0)[400:], mask(chances[400:], (0, "w"), 400))
    assert random16((0, "w", 2), 0, 1000).dtype == np.uint16


def test_a_mask_of_chances_follows_each() -> None:
    chances = torch.linspace(0, 1, 64).repeat_interleave(1 << 14)
    share = mask(chances, (0, "w"), 0).view(64, -1).mean(1)
    torch.testing.assert_close(share, torch.linspace(0, 1, 64), rtol=0, atol=0.02)
    assert share[0] == 0
    assert share[-1] == 1


def test_trims_keep_what_is_equal_to_the_end() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, float(np.nextafter(np.float32(1), 2))])
    assert trimmed(values, 1.0).tolist() == [-2, -1, 0, 0, 1, values[5].item()]
    assert trimmed(values, 0.0).tolist() == values.tolist()
    assert trimmed(values, float("inf")).eq(0).all()
    assert without_largest(values.clone(), 1.0).tolist() == [0, -1, 0, 0.5, 1, 0]
    assert without_largest(values.clone(), float("inf")).tolist() == values.tolist()

    # A double is where float32 rounds it to: the first two here to the end, the others beyond.
    end = float(np.float32(1 / 3))
    step = float(np.nextafter(np.float32(end), np.float32(1))) - end
    inside = torch.tensor([end - 0.4 * step, -end + 0.4 * step], dtype=torch.float64)
    assert torch.equal(trimmed(inside, end), inside)
    assert trimmed(inside - inside.sign() * 0.5 * step, end).eq(0).all()
    inside = torch.tensor([end + 0.4 * step, -end - 0.4 * step], dtype=torch.float64)
    assert torch.equal(without_largest(inside.clone(), end), inside)
    assert without_largest(inside + inside.sign() * 0.5 * step, end).eq(0).all()


@pytest.mark.parametrize("weight", [WEIGHT, (1.0, 1.0, 1.0), (1.0, -0.5, 2.0), (0.0, 0.0, 0.0)])
def test_elections_against_a_plain_reference(weight: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randint(-2, 3, (500,), generator=generator).float() for _ in range(3)]
    for normalise in (True, False):
        found = elected([vector.clone() for vector in vectors], weight, normalise=normalise)
        right = chosen([vector.double().numpy() for vector in vectors], weight, normalise)
        np.testing.assert_allclose(found.numpy(), right, rtol=1e-6, atol=1e-6)


def test_a_greater_count_may_outvote_a_greater_sum() -> None:
    vectors = [torch.tensor([5.0, 1.0]), torch.tensor([-1.0, 2.0]), torch.tensor([-1.0, -9.0])]

    def found(election: Any) -> list[float]:
        return elected([vector.clone() for vector in vectors], [1.0, 1.0, 1.0], normalise=True,
                       election=election).tolist()

    assert found("sum") == [5, -9]
    assert found("count") == [-1, 1.5]


def test_breadcrumbs_by_hand() -> None:
    one = torch.tensor([0.1, -9.0, 3.0, -2.0, 0.0, 1.0, 0.5, 0.2, 0.3, -4.0])
    merged = breadcrumbs([one], base=torch.zeros(10), key="k", weight=[1.0], density=0.3, gamma=0.1)
    assert merged.tolist() == [0, 0, 3, -2, 0, 0, 0, 0, 0, -4]
