"""Options that differ between members and between tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion import stream
from zoo.fusion.merging import merge_states
from zoo.fusion.specs import SPECS
from zoo.fusion.weighting import resolve_options
from zoo.options import checked
from zoo.registry import load

NAMED = {spec.name: spec for spec in SPECS}
SHAPES = {"embed.w": (6, 8), "layers.0.w": (300, 301), "layers.1.w": (9,), "layers.2.w": (7, 5),
          "head.w": (4, 3)}
DROPPING = ["ties", "dare_linear", "dare_ties", "della_linear", "della", "breadcrumbs",
            "breadcrumbs_ties"]


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


STATES, BASE = [state(1), state(2)], state(3)


def merge(name: str, states: list[dict[str, Tensor]] | None = None, **options: Any) -> Any:
    spec = NAMED[name]
    return merge_states(states or STATES, load(spec), spec=spec, seed=4, options=checked(
        spec, options), base=BASE if "base" in spec.uses else None)


def settings(name: str, **options: Any) -> Any:
    spec = NAMED[name]
    return resolve_options(spec, load(spec), checked(spec, options), list(SHAPES), 2)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs"])
@pytest.mark.parametrize("density", [[0.3, 0.8], [0.5, 1.0]])
def test_each_member_is_dropped_by_its_own_density(name: str, density: list[float]) -> None:
    """A sum of changes is that of each member alone, with its density for all."""
    of_rows = {"epsilon": [0.1, 0.05]} if name == "della_linear" else {}
    more = {} if name == "breadcrumbs" else {"convention": "mergekit"}
    both = merge(name, density=density, **of_rows, **more)
    alone = [merge(name, [STATES[0], BASE] if member == 0 else [BASE, STATES[1]],
                   density=density[member], **more, **{name: values[member]
                                                       for name, values in of_rows.items()})
             for member in (0, 1)]
    for key in SHAPES:
        torch.testing.assert_close(both[key], alone[0][key] + alone[1][key] - BASE[key],
                                   atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("convention", ["paper", "mergekit"])
def test_ties_trims_each_member_at_its_own_place(convention: str) -> None:
    density = [0.2, 0.6]
    merged = merge("ties", density=density, normalise=False, convention=convention)
    kept = []
    for one, fraction in zip(STATES, density, strict=True):
        vectors = {key: one[key] - BASE[key] for key in SHAPES}
        groups = [list(SHAPES)] if convention == "paper" else [[key] for key in SHAPES]
        for keys in groups:
            flat = torch.cat([vectors[key].flatten() for key in keys]).abs()
            least = flat.sort(descending=True).values[max(1, int(fraction * len(flat))) - 1]
            for key in keys:
                vectors[key] = vectors[key] * (vectors[key].abs() >= least)
        kept.append(vectors)
    for key in SHAPES:
        first, second = kept[0][key], kept[1][key]
        sign = torch.where(first + second >= 0, 1.0, -1.0)
        expected = BASE[key] + first * (first * sign > 0) + second * (second * sign > 0)
        torch.testing.assert_close(merged[key], expected)


@pytest.mark.parametrize("name", [*DROPPING, "task_arithmetic", "sce", "consensus"])
def test_an_option_by_pattern_is_that_of_its_tensors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"convention": "mergekit"} if name == "ties" else {}
    if name in DROPPING:
        options["density"] = {"layers.*": [0.3, 0.8], "*": 0.6}
    options["scale"] = {"layers.[01].*": 0.5, "*": 2.0}
    for piece in (1000, 1 << 18):
        monkeypatch.setattr(stream, "PIECE", piece)
        merged = merge(name, **options)
        for pattern, density, scale in (("layers.0.w", [0.3, 0.8], 0.5), ("head.w", 0.6, 2.0),
                                        ("layers.2.w", [0.3, 0.8], 2.0)):
            own = {"density": density} if name in DROPPING else {}
            alone = merge(name, **{**options, "scale": scale, **own})
            torch.testing.assert_close(merged[pattern], alone[pattern])


def test_options_are_resolved_like_weights() -> None:
    found = settings("ties", density=[0.2, {"layers.*": 0.5, "*": 0.7}], convention="mergekit",
                     scale=[1.0, 0.0], normalise={"head.*": False, "*": True})
    assert found.own["layers.1.w"] == {"density": (0.2, 0.5), "scale": 0.5, "normalise": True}
    assert found.own["head.w"] == {"density": (0.2, 0.7), "scale": 0.0, "normalise": False}
    assert found.common["election"] == "sum"
    same = settings("ties", density={"layers.*": 0.3, "*": [0.3, 0.3]})
    assert same.common["density"] == (0.3, 0.3)
    assert not same.own


def test_whole_numbers_may_differ_by_pattern() -> None:
    found = settings("karcher", max_iter={"layers.*": 3, "*": 7})
    assert {key: each["max_iter"] for key, each in found.own.items()} == {
        key: 3 if key.startswith("layers") else 7 for key in SHAPES}


@pytest.mark.parametrize("patterns", [
    {"*.weight": 0.5, "*.bias": 2.0}, {"*running*": 7.0, "*.weight": 0.5, "*": 2.0}])
def test_patterns_may_name_running_statistics_and_need_not(patterns: dict[str, float]) -> None:
    names = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    base, *states = [dict(zip(names, torch.rand(4, 5), strict=True)) for _ in range(3)]
    spec = NAMED["task_arithmetic"]
    found = merge_states(states, load(spec), spec=spec, base=base,
                         options=checked(spec, {"scale": patterns}))
    for key, scale in (("bn.weight", 0.5), ("bn.bias", 2.0)):
        alone = merge_states(states, load(spec), spec=spec, base=base,
                             options=checked(spec, {"scale": scale}))
        torch.testing.assert_close(found[key], alone[key])
    torch.testing.assert_close(found["bn.running_mean"], alone["bn.running_mean"])


@pytest.mark.parametrize("weight", [{1: 1}, [1, {1: 1}]])
def test_a_pattern_of_weights_is_text(weight: Any) -> None:
    with pytest.raises(OptionError, match="a weight pattern is 1, expected text"):
        merge_states(STATES, load(NAMED["average"]), spec=NAMED["average"], weight=weight)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("ties", {"density": {0: 0.5}}, "a density pattern is 0, expected text"),
    ("ties", {"density": [0.2, {None: 0.5}]}, "a density pattern is None, expected text"),
    ("ties", {"scale": {1: 1}}, "a scale pattern is 1, expected text"),
    ("ties", {"density": [0.2]}, r"density is \[0.2\], expected a number or 2 of them"),
    ("ties", {"density": [0.2, 1.5]}, r"density is 1.5 for member 2 in '.*', expected a fraction"),
    ("della", {"density": 0.5, "epsilon": [0.1, 0.7]}, r"0.5 ± 0.7 for member 2 in 'embed.w'"),
    ("breadcrumbs", {"gamma": {"head.*": [0.1, 1.0], "*": 0.1}}, "1.0 for member 2 in 'head.w'"),
    ("ties", {"density": {"layers.*": 0.2}}, "no density pattern matches the tensor 'embed.w'"),
    ("ties", {"scale": {"lyers.*": 0.2, "*": 1}}, "the scale pattern 'lyers.*' decides no tensor"),
    ("ties", {"density": {"layers.*": 0.2, "*": 0.3}},
     "density differs between tensors, and what it decides is measured over the whole model; "
     "convention='mergekit' measures each tensor for itself; give one value for all"),
    ("pcb", {"ratio": [0.1, 0.2]}, "ratio differs between tensors"),
    ("ties", {"density": [0.2, "x"]}, "the option 'density' is 'x': input should be a valid"),
    ("karcher", {"max_iter": [1, 10]}, r"'max_iter' is \[1, 10\], expected a whole number or {pat"),
    ("wudi", {"steps": {"layers.*": [1, 4], "*": 1}}, r"'steps' is \[1, 4\], expected a whole num"),
    ("swa", {"start": [0, 1]}, r"'start' is \[0, 1\], expected a whole number"),
    ("ties", {"normalise": [True, False]}, "a normalise is True, expected a finite number"),
])
def test_options_that_do_not_fit_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        merge(name, **options)


@pytest.mark.parametrize("base", [False, True])
def test_nuslerp_by_columns(base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as by rows of the transposed matrices, however it is cut."""
    spec = NAMED["nuslerp"]
    large = {key: tensor for key, tensor in BASE.items() if tensor.dim() == 2}

    def run(states: list[dict[str, Tensor]], over: str, start: dict[str, Tensor]) -> Any:
        return merge_states(states, load(spec), spec=spec, options={"over": over},
                            weight=[0.3, 0.7], base=start if base else None)

    def turned(each: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: each[key].T.contiguous() for key in large}

    expected = run([turned(each) for each in STATES], "rows", turned(BASE))
    for piece in (900, 1 << 18):
        monkeypatch.setattr(stream, "PIECE", piece)
        monkeypatch.setattr(stream, "MEASURED_PIECE", piece)
        found = run(STATES, "columns", BASE)
        for key in large:
            torch.testing.assert_close(found[key], expected[key].T, atol=1e-5, rtol=1e-5)
