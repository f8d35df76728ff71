"""Methods on the sphere against their definitions, on whole vectors in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import FusionError, OptionError
from zoo.fusion.merging import merge_states
from zoo.fusion.specs import SPECS
from zoo.fusion.weights.karcher import karcher
from zoo.fusion.weights.model_stock import model_stock
from zoo.fusion.weights.multislerp import multislerp
from zoo.fusion.weights.nuslerp import nuslerp
from zoo.fusion.weights.slerp import slerp
from zoo.options import checked
from zoo.registry import load

Vector = NDArray[np.float64]
NAMED = {spec.name: spec for spec in SPECS}
WEIGHT = (1.0, 0.5, 2.0)


def members(count: int, *shape: int, spread: float = 1.0, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    return [common + spread * torch.randn(shape, generator=generator) for _ in range(count)]


def merge(name: str, tensors: Sequence[Tensor], base: Tensor | None = None, *,
          weight: Any = None, **options: Any) -> Tensor:
    spec = NAMED[name]
    states = [{"w": tensor} for tensor in tensors]
    return merge_states(states, load(spec), spec=spec, weight=weight,
                        base=None if base is None else {"w": base},
                        options=checked(spec, options))["w"]


def flat(tensors: Sequence[Tensor]) -> list[Vector]:
    return [tensor.double().numpy().ravel() for tensor in tensors]


def norm(vector: Vector) -> float:
    return float(np.sqrt(vector @ vector))


def arc(one: Vector, other: Vector, t: float) -> Vector:
    angle = np.arccos(one @ other / norm(one) / norm(other))
    mixed: Vector = (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)
    return mixed


def tangent_mean(vectors: Sequence[Vector], weight: Vector) -> Vector:
    """Multi-SLERP as published: one step in the tangent space at the mean direction."""
    units = [vector / norm(vector) for vector in vectors]
    mean = sum(w * unit for w, unit in zip(weight, units, strict=True))
    mean /= norm(mean)
    step = sum(w * (unit - unit @ mean * mean) for w, unit in zip(weight, units, strict=True))
    angle = norm(step) + 1e-12
    reached: Vector = np.cos(angle) * mean + np.sin(angle) / angle * step
    return reached * sum(w * norm(vector) for w, vector in zip(weight, vectors, strict=True))


def fixed_point(vectors: Sequence[Vector], weight: Vector) -> Vector:
    """The Karcher mean: where the mean of the logarithms is zero."""
    units = [vector / norm(vector) for vector in vectors]
    mean = sum(w * unit for w, unit in zip(weight, units, strict=True))
    for _ in range(200):
        mean /= norm(mean)
        step = np.zeros_like(mean)
        for w, unit in zip(weight, units, strict=True):
            angle = np.arccos(np.clip(unit @ mean, -1, 1))
            step += w * angle / np.sin(angle) * (unit - unit @ mean * mean)
        size = norm(step) + 1e-30
        mean = np.cos(size) * mean + np.sin(size) / size * step
    scaled: Vector = mean / norm(mean) * sum(
        w * norm(vector) for w, vector in zip(weight, vectors, strict=True))
    return scaled


def stock(vectors: Sequence[Vector], start: Vector, weight: Vector) -> Vector:
    changes = [vector - start for vector in vectors]
    count = len(changes)
    cosine = np.mean([changes[i] @ changes[j] / norm(changes[i]) / norm(changes[j])
                      for i in range(count) for j in range(i)])
    ratio = count * cosine / ((count - 1) * cosine + 1)
    mean = np.array(weight) @ np.array(vectors)
    mixed: Vector = ratio * mean + (1 - ratio) * start
    return mixed


@pytest.mark.parametrize("shape", [(40, 30), (3,), (500, 7, 3, 3), (400, 400)])
@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_against_the_definitions(shape: tuple[int, ...], spread: float) -> None:
    three, weight = members(3, *shape, spread=spread), np.array(WEIGHT) / sum(WEIGHT)
    two, (start,) = three[:2], members(1, *shape, seed=4)
    vectors, origin = flat(three), flat([start])[0]
    changes = [vector - origin for vector in vectors]
    t = WEIGHT[1] / (WEIGHT[0] + WEIGHT[1])
    expected = {
        "slerp": (merge("slerp", two, t=0.3), arc(vectors[0], vectors[1], 0.3)),
        "slerp by weight": (merge("slerp", two, weight=WEIGHT[:2]),
                            arc(vectors[0], vectors[1], t)),
        "slerp by both": (merge("slerp", two, t=0.2, weight=WEIGHT[:2]),
                          arc(vectors[0], vectors[1], 0.1 / (0.8 + 0.1))),
        "nuslerp": (merge("nuslerp", two, weight=WEIGHT[:2]), arc(vectors[0], vectors[1], t)),
        "nuslerp, base": (merge("nuslerp", two, start, weight=WEIGHT[:2]),
                          origin + arc(changes[0], changes[1], t)),
        "multislerp": (merge("multislerp", three, weight=WEIGHT), tangent_mean(vectors, weight)),
        "multislerp, base": (merge("multislerp", three, start, weight=WEIGHT),
                             origin + tangent_mean(changes, weight)),
        "karcher": (merge("karcher", three, weight=WEIGHT, tol=1e-9, max_iter=100),
                    fixed_point(vectors, weight)),
        "model_stock": (merge("model_stock", three, start, weight=WEIGHT),
                        stock(vectors, origin, weight)),
    }
    for name, (found, right) in expected.items():
        np.testing.assert_allclose(found.double().numpy().ravel(), right, rtol=0,
                                   atol=2e-6 * np.abs(right).max(), err_msg=name)


@pytest.mark.parametrize("shape", [(6, 50), (6, 5, 3, 3), (7,)])
@pytest.mark.parametrize("name", ["nuslerp", "model_stock"])
def test_each_row_may_have_its_own_angle(name: str, shape: tuple[int, ...]) -> None:
    (start,), tensors = members(1, *shape, seed=4), members(2, *shape)
    found = merge(name, tensors, start, over="rows")
    rows = [[part] for part in zip(start, *tensors, strict=True)] if len(shape) > 1 else [
        [(start, *tensors)]]
    expected = [merge(name, parts[1:], parts[0]) for (parts,) in rows]
    torch.testing.assert_close(found, torch.stack(expected).view(shape), rtol=1e-5, atol=1e-6)
    if len(shape) > 1:
        assert not torch.allclose(found, merge(name, tensors, start), atol=1e-4)


def test_slerp_keeps_the_length_between_equals_and_ends_where_it_should() -> None:
    one, other = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    for t in (0.0, 0.25, 1.0):
        assert slerp([one, other], key="k", weight=[1, 1], t=t).norm().item() == pytest.approx(3)
    torch.testing.assert_close(slerp([one, other], key="k", weight=[1, 1], t=0.0), one)
    torch.testing.assert_close(slerp([one, other], key="k", weight=[0.2, 0.2], t=1.0), other)
    assert not torch.allclose(slerp([one, other], key="k", weight=[2, 1]),
                              slerp([one, other], key="k", weight=[1, 1]))


Strategy = Callable[..., Tensor]


@pytest.mark.parametrize("strategy", [slerp, nuslerp, multislerp, karcher])
def test_straight_where_there_is_no_arc(strategy: Strategy) -> None:
    one = torch.tensor([1.0, 2.0])
    for other, mean in ((3 * one, 2 * one), (-one, 0 * one), (0 * one, 0.5 * one)):
        merged = strategy([one, other], key="k", weight=[1.0, 1.0])
        torch.testing.assert_close(merged, mean, rtol=1e-5, atol=1e-6)
    zero = torch.zeros(3)
    assert torch.equal(strategy([zero, zero], key="k", weight=[1.0, 1.0]), zero)
    assert strategy([torch.zeros(0)] * 2, key="k", weight=[1.0, 1.0]).shape == (0,)


def test_mergekit_goes_straight_earlier() -> None:
    one = torch.tensor([1.0, 0.0])
    near = torch.tensor([1.0, 0.02])  # cos φ = 0.9998
    paper, theirs = (slerp([one, 4 * near], key="k", weight=[1, 1], convention=convention)
                     for convention in ("paper", "mergekit"))
    torch.testing.assert_close(theirs, (one + 4 * near) / 2)
    assert not torch.equal(paper, theirs)
    torch.testing.assert_close(paper, theirs, rtol=1e-3, atol=0)
    apart = torch.tensor([1.0, 0.1])  # cos φ = 0.995
    assert torch.equal(slerp([one, apart], key="k", weight=[1, 1], convention="mergekit"),
                       slerp([one, apart], key="k", weight=[1, 1]))


def test_karcher_of_signs_does_not_explode() -> None:
    values = [torch.tensor([value]) for value in (-0.3359, -1.3082, 0.7770)]
    merged = karcher(values, key="k", weight=[1.0, 1.0, 1.0])
    assert merged.item() == pytest.approx(-np.mean([0.3359, 1.3082, 0.7770]), rel=1e-5)


def test_karcher_stops_early_when_told() -> None:
    tensors = members(3, 50, spread=3.0)
    far = karcher(tensors, key="k", weight=WEIGHT, max_iter=50, tol=0)
    start = karcher(tensors, key="k", weight=WEIGHT, max_iter=0)
    torch.testing.assert_close(start, multislerp(tensors, key="k", weight=WEIGHT))
    assert not torch.allclose(start, far, atol=1e-3)
    torch.testing.assert_close(karcher(tensors, key="k", weight=WEIGHT), far, rtol=1e-4, atol=1e-4)
    with pytest.raises(OptionError, match=r"max_iter is -1 and tol is 1e-05, expected 0 or more"):
        karcher(tensors, key="k", weight=WEIGHT, max_iter=-1)


def test_multislerp_may_keep_its_weights() -> None:
    tensors = members(3, 50)
    kept = multislerp(tensors, key="k", weight=WEIGHT, normalise=False)
    torch.testing.assert_close(kept, 3.5 * multislerp(tensors, key="k", weight=WEIGHT))


def test_a_single_member_is_itself() -> None:
    (one,), (base,) = members(1, 9, spread=0.5), members(1, 9)
    for merged in (multislerp([one], key="k", weight=[0.5]), karcher([one], key="k", weight=[2]),
                   multislerp([one], base=base, key="k", weight=[1.0])):
        torch.testing.assert_close(merged, one, rtol=1e-5, atol=1e-6)


def test_model_stock_goes_where_the_angles_say() -> None:
    base = torch.ones(2)
    one, other = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])

    def at(tensors: list[Tensor], **options: Any) -> Tensor:
        return model_stock(tensors, base=base, key="k", weight=[1.0] * len(tensors), **options)

    torch.testing.assert_close(at([one, other]), base)  # at right angles nothing is in common
    torch.testing.assert_close(at([one, one]), one)
    torch.testing.assert_close(at([base, base]), base)
    torch.testing.assert_close(at([one, 2 * base - one]), base)  # 1 + cos φ is zero
    small = [base + 1e-4 * (one - base)] * 2
    torch.testing.assert_close(at(small), small[0], rtol=0, atol=1e-7)
    assert (at(small, convention="mergekit") - base).norm() < 0.05 * (small[0] - base).norm()


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
def test_weights_that_sum_to_zero_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=name + r": the weights .* of 'w' sum to zero"):
        merge(name, members(2, 4), torch.ones(4), weight=[1.0, -1.0])


def test_the_number_of_members_is_the_methods() -> None:
    for name, count in (("slerp", 3), ("nuslerp", 1), ("model_stock", 1)):
        with pytest.raises(FusionError, match=f"{name} cannot fuse these members: it takes"):
            merge(name, members(count, 4), torch.ones(4))


def test_large_halves_do_not_overflow() -> None:
    large = torch.full((100,), 40_000.0, dtype=torch.float16)
    for name in ("slerp", "nuslerp", "multislerp", "karcher"):
        assert torch.equal(merge(name, [large, large]), large), name
    assert torch.equal(merge("model_stock", [large, large], large / 2), large)
