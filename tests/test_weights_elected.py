"""Methods that choose among the members entry by entry, and those on a run's checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.merging import merge_states
from zoo.fusion.specs import SPECS
from zoo.fusion.weights.consensus import consensus
from zoo.fusion.weights.ema import ema
from zoo.fusion.weights.lines import lines
from zoo.fusion.weights.magmax import magmax
from zoo.fusion.weights.sce import sce
from zoo.fusion.weights.swa import swa
from zoo.options import checked
from zoo.registry import load

Vector = NDArray[np.float64]
NAMED = {spec.name: spec for spec in SPECS}
WEIGHT = (1.0, 0.5, 2.0)
SCALES = {"a": 0.1, "b": 1.0, "c": 3.0}
SHAPES = {"a": (150, 100), "b": (25,), "c": ()}


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: SCALES[key] * torch.randn(shape, generator=generator)
            for key, shape in SHAPES.items()}


STATES, BASE = [state(seed) for seed in (1, 2, 3)], state(9)


def merge(name: str, states: Any = None, base: Any = None, **options: Any) -> dict[str, Tensor]:
    spec = NAMED[name]
    return merge_states(states or STATES, load(spec), spec=spec, base=base or BASE,
                        weight=list(WEIGHT), options=checked(spec, options))


def flat(one: dict[str, Tensor], keys: list[str]) -> Vector:
    return np.concatenate([one[key].double().numpy().ravel() for key in keys])


def close(found: dict[str, Tensor], keys: list[str], change: Vector) -> None:
    np.testing.assert_allclose(flat(found, keys), flat(BASE, keys) + change, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("select", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("convention", ["paper", "mergekit"])
def test_sce_against_its_definition(select: float, convention: str) -> None:
    small = 1e-3 if convention == "mergekit" else 1.0  # so that its floors are met
    states = [{key: BASE[key] + small * tensor for key, tensor in one.items()} for one in STATES]
    merged = merge("sce", states, select_topk=select, scale=0.7, convention=convention)
    for key in SHAPES:
        start = flat(BASE, [key])
        vectors = np.stack([flat(one, [key]) for one in states]) - start  # (M, n)
        variance = vectors.var(0)
        if select < 1:
            keep = int(select * np.count_nonzero(variance))
            vectors[:, np.argsort(-variance, kind="stable")[keep:]] = 0
        squares = (vectors ** 2).mean(1)
        shares = squares / squares.sum() if squares.sum() >= 1e-6 else np.full(3, 1 / 3)
        if convention == "paper":
            shares = squares / squares.sum() if squares.sum() else np.full(3, 1 / 3)
        shares = shares * WEIGHT
        sign = np.where(vectors.sum(0) >= 0, 1, -1)
        agrees = (np.sign(vectors) == sign) * shares[:, None]
        change = (agrees * vectors).sum(0) / np.maximum(agrees.sum(0), 1e-6)
        np.testing.assert_allclose(flat(merged, [key]) - start, 0.7 * change, rtol=1e-3,
                                   atol=3e-7 if small < 1 else 2e-6)


def test_shares_that_are_nothing_in_float32_make_no_nan() -> None:
    small, large = torch.zeros(4), torch.zeros(4)
    small[0], large[1] = 1e-20, 1e6
    found = sce([small, large], base=torch.zeros(4), key="k", weight=[0.5, 0.5], select_topk=1.0)
    assert found.tolist() == [0, 1e6, 0, 0]


def test_sce_selects_where_members_differ() -> None:
    base = torch.zeros(4)
    one, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 1.0, -4.0])
    merged = sce([one, other], base=base, key="k", weight=[1.0, 1.0], select_topk=0.5)
    assert merged.tolist() == [0, 0, 0, 4]  # one of the two that differ; a sum of zero counts as +
    merged = sce([one, one], base=base, key="k", weight=[1.0, 1.0], select_topk=0.5)
    assert merged.tolist() == [0, 0, 0, 0]
    with pytest.raises(OptionError, match=r"sce: select_topk is 0, expected a fraction in \(0, 1"):
        sce([one], base=base, key="k", weight=[1.0], select_topk=0)


def test_sce_has_mergekits_floor_under_its_weights() -> None:
    tensors = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-4])]
    paper, theirs = (sce([tensor + 0 for tensor in tensors], base=torch.zeros(2), key="k",
                         weight=[1.0, 1e-7], select_topk=1.0, convention=convention)
                     for convention in ("paper", "mergekit"))
    assert paper[1].item() == pytest.approx(1e-4)
    assert theirs[1].item() == pytest.approx(1e-4 * 0.5e-7 / 1e-6, rel=1e-3)


def reference_pcb(vectors: Vector, ratio: float) -> Vector:
    """As the authors' released code has it, with sorts."""
    count, size = vectors.shape
    ordered = np.sort(np.abs(vectors), axis=1)
    least = ordered[:, [int(size * 1e-4)]]
    most = ordered[:, [int(size * (1 - 1e-4) - 1)]]
    magnitude = np.clip(np.abs(vectors), least, most)
    own = (magnitude - least) / (most - least)
    balance = np.exp(count * own ** 2) * np.tanh(vectors * vectors.sum(0))
    ordered = np.sort(balance, axis=1)
    threshold, top = ordered[:, [int(size * (1 - ratio))]], ordered[:, [-1]]
    counts = (np.clip(balance, threshold, None) - threshold) / (top - threshold)
    changes = np.sign(vectors) * magnitude * counts * np.array(WEIGHT)[:, None]
    merged: Vector = changes.sum(0) / np.maximum(counts.sum(0), 1e-12)
    return merged


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_pcb_against_its_definition(ratio: float) -> None:
    keys = list(SHAPES)
    vectors = np.stack([flat(one, keys) for one in STATES]) - flat(BASE, keys)
    close(merge("pcb", ratio=ratio, scale=0.7), keys, 0.7 * reference_pcb(vectors, ratio))
    with pytest.raises(OptionError, match=r"pcb: ratio is 2.0, expected a fraction in \(0, 1\]"):
        merge("pcb", ratio=2.0)


@pytest.mark.parametrize("agree", [0, 1, 2, 3])
def test_consensus_against_its_definition(agree: int) -> None:
    keys = list(SHAPES)
    merged = merge("consensus", agree=agree, strictness=0.6, scale=0.7)
    vectors = np.stack([flat(one, keys) for one in STATES]) - flat(BASE, keys)
    total = np.array(WEIGHT) @ vectors
    votes = (np.abs(vectors) > 0.6 * np.abs(total - vectors)).sum(0)
    assert 0 < (votes >= agree).sum() <= len(votes)
    close(merged, keys, 0.7 * total * (votes >= agree))


def test_consensus_wants_as_many_as_there_are() -> None:
    for agree in (-1, 3):
        with pytest.raises(OptionError, match=f"agree is {agree}, expected 0 to 2 members"):
            consensus([torch.ones(1)] * 2, base=torch.ones(1), key="k", weight=[1, 1], agree=agree)


def test_magmax_takes_the_largest_change() -> None:
    base = torch.ones(4)
    tensors = [base + torch.tensor(change) for change in
               ([3.0, -1.0, 2.0, 0.0], [-4.0, -2.0, -2.0, 0.0], [1.0, -0.5, 1.0, 0.0])]
    merged = magmax(tensors, base=base, key="k", weight=[1.0, 1.0, 1.0], scale=0.5)
    torch.testing.assert_close(merged, base + 0.5 * torch.tensor([-4.0, -2.0, 2.0, 0.0]))
    weighted = magmax(tensors, base=base, key="k", weight=[1.0, 0.5, -4.0])
    torch.testing.assert_close(weighted, base + torch.tensor([-4.0, 2.0, -4.0, 0.0]))


def test_lines_scales_with_the_depth() -> None:
    base, tensors = torch.ones(2), [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 5.0])]
    change = torch.tensor([1.0, 4.0])

    def at(depth: float, **options: Any) -> Tensor:
        return lines(tensors, base=base, key="k", weight=[1.0, 1.0], depth=depth, **options)

    torch.testing.assert_close(at(0.0), base + change / 2)
    torch.testing.assert_close(at(1.0), base + change)
    torch.testing.assert_close(at(0.5, alpha=0.2, beta=0.4), base + 0.4 * change)
    keys = ("stem.weight", *(f"blocks.{n}.weight" for n in range(3)), "head.weight")
    states, start = [{key: torch.ones(1) for key in keys}], {key: torch.zeros(1) for key in keys}
    spec = NAMED["lines"]
    merged = merge_states(states, load(spec), spec=spec, base=start,
                          options=checked(spec, {"alpha": 0.1, "beta": 0.9}))
    assert [round(merged[key].item(), 6) for key in keys] == [0.1, 0.1, 0.55, 1.0, 1.0]


def test_swa_takes_its_checkpoints() -> None:
    run = [torch.tensor([float(value)]) for value in (9, 1, 2, 3, 7)]
    weight = [1.0] * 5
    assert swa(run, key="k", weight=weight).item() == pytest.approx(22 / 5)
    assert swa(run, key="k", weight=weight, start=1).item() == pytest.approx(13 / 4)
    assert swa(run, key="k", weight=weight, start=1, every=2).item() == pytest.approx(2)
    assert swa(run, key="k", weight=[0, 3, 9, 1, 0], start=1, every=2).item() == pytest.approx(1.5)
    for options in ({"start": 5}, {"start": -1}, {"every": 0}):
        with pytest.raises(OptionError, match=r"swa: start is .*, expected a start below the 5"):
            swa(run, key="k", weight=weight, **options)


def test_ema_is_the_running_mean() -> None:
    run = [torch.tensor([value, -value]) for value in (5.0, 1.0, 2.0, 8.0)]
    average = run[0]
    for checkpoint in run[1:]:
        average = 0.7 * average + 0.3 * checkpoint
    torch.testing.assert_close(ema(run, key="k", weight=[1.0] * 4, decay=0.7), average)
    assert torch.equal(ema(run, key="k", weight=[1.0] * 4, decay=0.0), run[-1])
    assert torch.equal(ema(run, key="k", weight=[1.0] * 4, decay=1.0), run[0])
    with pytest.raises(OptionError, match=r"ema: decay is 1.5, expected 0 to 1"):
        ema(run, key="k", weight=[1.0] * 4, decay=1.5)
