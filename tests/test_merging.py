"""The core around the weight strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import FusionError, OptionError, ShapeMismatch
from zoo.fusion import stream
from zoo.fusion.merging import merge_states
from zoo.fusion.specs import SPECS
from zoo.fusion.weighting import resolve_weights
from zoo.options import checked
from zoo.registry import load
from zoo.specs import FusionSpec

NAMED = {spec.name: spec for spec in SPECS}
State = Mapping[str, Tensor]


def merge(name: str, states: Sequence[State], base: State | None = None, **keywords: Any) -> Any:
    spec = NAMED[name]
    options = checked(spec, keywords.pop("options", {}))
    return merge_states(states, load(spec), spec=spec, base=base, options=options, **keywords)


def test_integers_and_bools_come_from_the_first_member() -> None:
    first = {"n": torch.tensor(7), "m": torch.tensor([True, False]), "w": torch.zeros(2)}
    second = {"n": torch.tensor(9), "m": torch.tensor([False, False]), "w": torch.ones(2)}
    merged = merge("average", [first, second])
    assert merged["n"].item() == 7
    assert merged["n"].dtype == torch.int64
    assert merged["m"].tolist() == [True, False]
    assert merged["w"].tolist() == [0.5, 0.5]


def test_running_statistics_are_pooled_and_stay_out_of_the_strategy() -> None:
    def member(mean: float, var: float) -> State:
        return {"bn.weight": torch.ones(1), "bn.running_mean": torch.tensor([mean]),
                "bn.running_var": torch.tensor([var])}

    base = member(100.0, 100.0)
    for name in ("average", "task_arithmetic", "ties"):
        merged = merge(name, [member(0.0, 1.0), member(4.0, 3.0)], base, weight=[1.0, 1.0])
        assert merged["bn.running_mean"].item() == 2, name
        assert merged["bn.running_var"].item() == 2 + 4, name  # within, and between the members
    weighted = merge("average", [member(0.0, 1.0), member(4.0, 3.0)], weight=[3.0, 1.0])
    assert weighted["bn.running_mean"].item() == 1
    assert weighted["bn.running_var"].item() == 1.5 + 3
    # Statistics have no part in what the trim ranks: one weight of two moved.
    moved = {**member(0.0, 1.0), "bn.weight": torch.tensor([1.5])}
    assert merge("ties", [moved], base)["bn.weight"].item() == 1.5


def test_a_forgotten_member_has_no_part_in_the_statistics() -> None:
    states = [{"w": torch.ones(1), "running_mean": torch.tensor([value])} for value in (2.0, 8.0)]
    base = {"w": torch.zeros(1)}
    merged = merge("task_arithmetic", states, base, weight=[1.0, -1.0])
    assert merged["running_mean"].item() == 2
    assert merge("task_arithmetic", states[:1], base, weight=[-1.0])["running_mean"].item() == 2
    heads = merge("task_arithmetic", states, {}, weight=[1.0, -1.0], averaged={"w"})
    assert heads["w"].item() == 1


def test_the_statistics_of_wise_ft_lie_on_its_line() -> None:
    base, member = nn.BatchNorm1d(3).state_dict(), nn.BatchNorm1d(3).state_dict()
    member["running_mean"].fill_(4)
    member["running_var"].fill_(9)
    merged = {alpha: merge("wise_ft", [member], base, options={"alpha": alpha})
              for alpha in (0.0, 0.25, 1.0)}
    assert merged[0.0]["running_var"].tolist() == [1, 1, 1]
    assert merged[0.25]["running_mean"].tolist() == [1, 1, 1]
    assert merged[1.0]["running_var"].tolist() == [9, 9, 9]


def test_norm_keys_may_be_given() -> None:
    states = [{"running_mean": torch.tensor([value])} for value in (1.0, 3.0)]
    base = {"running_mean": torch.zeros(1)}
    assert merge("task_arithmetic", states, base)["running_mean"].item() == 2
    added = merge("task_arithmetic", states, base, norm_keys=())
    assert added["running_mean"].item() == 4


def test_tied_tensors_are_fused_once_and_stay_tied() -> None:
    def net() -> nn.Module:
        tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        tied[1].weight = tied[0].weight
        return tied

    seen: list[str] = []
    spec = NAMED["average"]

    def watched(tensors: Sequence[Tensor], *, key: str, weight: Sequence[float]) -> Tensor:
        seen.append(key)
        return load(spec)(tensors, base=None, key=key, weight=weight)

    states = [net().state_dict() for _ in range(2)]
    merged = merge_states(states, watched, spec=spec)
    assert seen == ["0.weight"]
    assert merged["0.weight"] is merged["1.weight"]
    states[1]["1.weight"] = torch.zeros(3, 3)  # tied in one member only
    assert torch.equal(merge_states(states, watched, spec=spec)["1.weight"],
                       states[0]["1.weight"] / 2)


def test_skipped_keys_are_copied_and_averaged_keys_need_no_base() -> None:
    states = [{"w": torch.full((2,), value), "fc": torch.full((2,), value),
               "old": torch.full((2,), value)} for value in (1.0, 3.0)]
    merged = merge("task_arithmetic", states, {"w": torch.zeros(2)}, skip={"old"},
                   averaged={"fc"})
    assert merged["w"].tolist() == [4, 4]
    assert merged["fc"].tolist() == [2, 2]
    assert merged["old"].tolist() == [1, 1]


def test_half_precision_is_computed_in_float32() -> None:
    value = torch.tensor([1.001, 40_000.0], dtype=torch.float16)
    merged = merge("average", [{"w": value}] * 3000)["w"]
    assert merged.dtype == torch.float16
    assert torch.equal(merged, value)


def test_parameters_and_gradients_do_not_leak() -> None:
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    merged = merge("average", [dict(net.named_parameters()) for net in nets])
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_differing_members_are_refused_before_any_work() -> None:
    one = {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}
    with pytest.raises(ShapeMismatch) as error:
        merge("average", [one, one, {"a": torch.ones(2), "b": torch.ones(4)}])
    assert str(error.value) == (
        "average cannot fuse these members: tensor 'b' is [3] in member 1 and [4] in member 3; "
        "so do 'c' differ. 'concat' and 'gated' (features) or 'mean' and 'weighted' (outputs) "
        "fuse members of any architecture")
    assert error.value.key == "b"
    with pytest.raises(ShapeMismatch, match=r"'d' is missing in member 1 and \[1\] in member 2"):
        merge("average", [one, {**one, "d": torch.ones(1)}])
    with pytest.raises(ShapeMismatch, match=r"'a' is torch.float32 in member 1 and "
                       r"torch.float16 in member 2. Convert them to one dtype"):
        merge("average", [one, {**one, "a": torch.ones(2).half()}])
    with pytest.raises(ShapeMismatch, match=r"so do 'b', 'c' differ. Convert"):
        merge("average", [one, {key: tensor.half() for key, tensor in one.items()}])


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    one, broken = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}
    broken["b"][1] = math.nan
    for name in ("average", "ties", "tsv_m"):
        with pytest.raises(FusionError, match=r"tensor 'b' of member 2 has values that are not "
                                              r"finite \(NaN or infinity\). Leave member 2 out"):
            merge(name, [one, broken], one)
    with pytest.raises(FusionError, match="tensor 'b' of the base has"):
        merge("ties", [one, one], broken)
    large = {"a": torch.full((2,), 4e4, dtype=torch.float16)}
    assert merge("average", [large, large])["a"].tolist() == [4e4, 4e4]
    with pytest.raises(FusionError, match=r"the result, tensor 'a' has values beyond the range of "
                                          "torch.float16"):
        merge("average", [large, large], options={"normalise": False})


@pytest.mark.parametrize("name", ["average", "ties", "tsv_m", "slerp", "dare_ties", "wudi"])
def test_infinities_that_are_the_same_in_all_are_no_weights(name: str) -> None:
    mask = torch.full((3, 3), -math.inf).triu(1)
    plain = [{"a": torch.randn(4, 4), "b": torch.randn(4)} for _ in range(3)]
    masked = [{"mask": mask, **state, "most": torch.tensor(math.inf)} for state in plain]
    expected = merge(name, plain[:2], plain[2])
    merged = merge(name, masked[:2], masked[2])
    assert torch.equal(merged.pop("mask"), mask)
    assert merged.pop("most") == math.inf
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    masked[1]["mask"] = -mask
    with pytest.raises(FusionError, match="'mask' of member 1 has values that are not finite"):
        merge(name, masked[:2], masked[2])


def test_a_base_must_fit() -> None:
    one = {"a": torch.ones(2), "n": torch.tensor(1)}
    with pytest.raises(FusionError, match=r"ties cannot .* none is given. Pass base="):
        merge("ties", [one])
    with pytest.raises(ShapeMismatch, match=r"'a' is \[2\] in member 1 and \[3\] in the base. "
                       "Pass the base that the members started from"):
        merge("ties", [one], {"a": torch.ones(3)})
    with pytest.raises(ShapeMismatch, match=r"'a' is \[2\] in member 1 and missing in the base"):
        merge("ties", [one], {})


def test_the_number_of_members_is_checked() -> None:
    one = {"a": torch.ones(2)}
    with pytest.raises(FusionError, match="it takes exactly 1, and 2 are given"):
        merge("wise_ft", [one, one], one)


def spec(scope: Any, **fields: Any) -> FusionSpec:
    return FusionSpec(name="mine", build="a:b", kind="weights", scope=scope, members=(1, None),
                      **fields)


def test_a_slice_learns_its_offset_and_the_tensors_shape() -> None:
    calls: list[Any] = []

    def build(tensors: Sequence[Tensor], *, base: Tensor, offset: int,
              shape: tuple[int, ...]) -> Tensor:
        calls.append((tensors[0].shape, base.shape, offset, shape))
        return tensors[0] + base

    states = [{"w": torch.ones(2, 3)}]
    merged = merge_states(states, build, spec=spec("slice", uses={"base"}), base=states[0])
    assert calls == [((6,), (6,), 0, (2, 3))]
    assert torch.equal(merged["w"], torch.full((2, 3), 2.0))


def test_rows_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def build(tensors: Sequence[Tensor], *, key: str, offset: int,
              shape: tuple[int, ...]) -> Tensor:
        calls.append((key, offset, tensors[0].numel()))
        assert shape == tuple(states[0][key].shape)
        return tensors[0] + 1

    monkeypatch.setattr(stream, "PIECE", 20)
    states = [{"kernels": torch.zeros(5, 2, 2, 2), "wide": torch.zeros(2, 50),
               "vector": torch.zeros(30), "scalar": torch.zeros(()), "none": torch.zeros(0, 3)}]
    merged = merge_states(states, build, spec=spec("rows"))
    assert calls == [("kernels", 0, 16), ("kernels", 16, 16), ("kernels", 32, 8), ("wide", 0, 50),
                     ("wide", 50, 50), ("vector", 0, 30), ("scalar", 0, 1), ("none", 0, 0)]
    assert all(torch.equal(merged[key], states[0][key] + 1) for key in merged)


def test_a_strategy_may_see_the_whole_model() -> None:
    def build(states: Sequence[State], *, base: State | None, weights: Mapping[str, Any],
              gain: float) -> dict[str, Tensor]:
        assert base is None
        assert all(state[key].dtype == torch.float32 for state in states for key in weights)
        assert all("n" in state for state in states)
        largest = max(state[key].abs().max() for state in states for key in weights)
        return {key: states[0][key] / largest * gain * weights[key][0] for key in weights}

    states = [{"a": torch.ones(2).half(), "b": torch.full((1,), 4.0), "n": torch.tensor(1)}]
    by_mode = spec({"mode": {"all": "model", "each": "tensor"}, "gain": {"2.0": "slice"}})
    merged = merge_states(states, lambda states, *, base, weights, gain:
                          build(states, base=base, weights=weights, gain=gain), spec=by_mode,
                          options={"mode": "all", "gain": 2.0}, weight={"a": 3.0, "b": 1.0})
    assert merged["a"].tolist() == [1.5, 1.5]
    assert merged["a"].dtype == torch.float16
    assert merged["b"].tolist() == [2.0]

    with pytest.raises(ShapeMismatch, match=r"'b' became missing, from \[1\]. This is a defect"):
        merge_states(states, lambda states: {"a": states[0]["a"]}, spec=spec("model"))


def test_a_strategy_that_changes_a_shape_is_named() -> None:
    with pytest.raises(ShapeMismatch, match=r"'w' became \[1\], from \[2\]. This is a defect"):
        merge_states([{"w": torch.ones(2)}], lambda tensors: tensors[0][:1], spec=spec("tensor"))


def test_results_and_measures_do_not_depend_on_cuts_or_threads(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *states = [{key: torch.randn(shape, generator=generator)
                      for key, shape in (("a", (300, 7)), ("b", (5,)), ("c", (0, 3)))}
                     for _ in range(4)]
    kinds = [spec("slice", uses={"base"}, measure=f"{__name__}:norms", measured_over=over)
             for over in ("tensor", "model")]
    whole = [merge_states(states, scaled, spec=kind, base=base) for kind in kinds]
    assert not torch.equal(whole[0]["b"], whole[1]["b"])
    monkeypatch.setattr(stream, "_SMALL", 0)
    for piece, threads in ((7, 1), (64, 3), (1 << 17, 2)):
        monkeypatch.setattr(stream, "PIECE", piece)
        monkeypatch.setattr(stream, "MEASURED_PIECE", 2 * piece)
        monkeypatch.setattr(stream, "cores", lambda threads=threads: threads)
        for kind, expected in zip(kinds, whole, strict=True):
            cut = merge_states(states, scaled, spec=kind, base=base)
            for key in expected:
                assert torch.allclose(cut[key], expected[key], rtol=1e-6, atol=0)


def test_small_tensors_come_joined_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, tuple[float, ...]]] = []

    def build(tensors: Sequence[Tensor], *, base: Tensor, key: str, weight: Any,
              shape: tuple[int, ...]) -> Tensor:
        calls.append((key, len(base), weight))
        assert math.prod(shape) >= len(base)
        return base.add(tensors[0] - base, alpha=weight[0])

    monkeypatch.setattr(stream, "PIECE", 64)
    shapes = {"a": (5, 7), "wide": (9,), "none": (0, 3), "b": (3,), "large": (70,), "c": (40,),
              "other": (2,)}
    generator = torch.Generator().manual_seed(0)
    base, state = ({key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
                   for _ in range(2))
    base["wide"] = base["wide"].double()  # computes in another precision than its neighbours
    weight = {"other": 0.7, "*": 0.3}
    merged = [merge_states([state], build, base=base, weight=weight,
                           spec=spec("slice", uses={"base"}, elementwise=joins))
              for joins in (False, True)]
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in shapes)
    assert calls[8:] == [("large", 64, (0.3,)), ("large", 6, (0.3,)), ("a", 38, (0.3,)),
                         ("wide", 9, (0.3,)), ("c", 40, (0.3,)), ("other", 2, (0.7,))]


def norms(tensors: Sequence[Tensor], *, base: Tensor, measured: tuple[Any, ...]) -> Tensor | None:
    if measured:
        return None
    return torch.stack([(tensor - base).double().square().sum() for tensor in tensors])


def scaled(tensors: Sequence[Tensor], *, base: Tensor, measured: tuple[Any, ...]) -> Tensor:
    assert not torch.is_grad_enabled()
    return base + sum((tensor - base) / square.sqrt()
                      for tensor, square in zip(tensors, measured[0], strict=True))


def test_an_error_in_a_thread_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_SMALL", 0)
    monkeypatch.setattr(stream, "cores", lambda: 2)

    def broken(tensors: Sequence[Tensor], *, key: str) -> Tensor:
        raise OptionError("mine", f"{key!r} is not for me")

    before = torch.get_num_threads()
    with pytest.raises(OptionError, match="'w' is not for me"):
        merge_states([{"w": torch.ones(9)}], broken, spec=spec("slice"))
    assert torch.get_num_threads() == before


def test_a_strategy_is_told_seed_depth_and_what_is_given() -> None:
    seen: dict[str, Any] = {}

    def build(tensors: Sequence[Tensor], *, key: str, seed: int, depth: float,
              data: Any) -> Tensor:
        seen[key] = (seed, depth, data)
        return tensors[0]

    states = [{"conv1.w": torch.ones(1), "layer1.0.w": torch.ones(1), "fc.w": torch.ones(1)}]
    merge_states(states, build, spec=spec("tensor", uses={"data"}), seed=3, given={"data": "some"})
    assert seen == {"conv1.w": (3, 0.0, "some"), "layer1.0.w": (3, 0.5, "some"),
                    "fc.w": (3, 1.0, "some")}


def test_running_statistics_of_a_model_scoped_strategy_are_its_own() -> None:
    def build(states: Sequence[State], *, weights: Mapping[str, Any]) -> dict[str, Tensor]:
        assert set(weights) == {"bn.weight"}
        return {key: states[1][key] for key in ("bn.weight", "bn.running_mean")}

    states = [{"bn.weight": torch.ones(1), "bn.running_mean": torch.full((1,), value),
               "bn.running_var": torch.full((1,), value)} for value in (1.0, 3.0)]
    merged = merge_states(states, build, spec=spec("model"))
    assert merged["bn.running_mean"].item() == 3
    assert merged["bn.running_var"].item() == 2 + 1  # pooled by the core


def one_pass(tensors: Sequence[Tensor], *, measured: tuple[Any, ...]) -> float | None:
    return None if measured else float(tensors[0].square().sum())


def endless(tensors: Sequence[Tensor]) -> float:
    return 1.0


def test_measures_are_added_up_over_the_model_and_handed_back() -> None:
    def build(tensors: Sequence[Tensor], *, measured: tuple[float, ...]) -> Tensor:
        return tensors[0] / measured[0] ** 0.5

    states = [{"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}]
    measuring = spec("tensor", measure=f"{__name__}:one_pass")
    merged = merge_states(states, build, spec=measuring)
    assert merged["a"].item() == pytest.approx(0.6)
    assert merged["b"].item() == pytest.approx(0.8)
    with pytest.raises(FusionError, match=r"after 10 passes it still measures. Its measure must"):
        merge_states(states, build, spec=spec("tensor", measure=f"{__name__}:endless"))


KEYS = ["blocks.0.w", "blocks.9.w", "head.w"]


@pytest.mark.parametrize(("weight", "expected"), [
    (None, [(1, 1), (1, 1), (1, 1)]),
    ([[1, 0], 0.5], [(1, 0.5), (0, 0.5), (0, 0.5)]),
    ({"blocks.*": [[1, 3], [3, 0, 4]], "*": [[0, 9], 2]}, [(1, 3), (3, 4), (9, 2)]),
    (0.5, [(0.5, 0.5)] * 3),
    ([0.3, 0.7], [(0.3, 0.7)] * 3),
    ({"blocks.[0-5].*": 0.3, "*": 0.7}, [(0.3, 0.3), (0.7, 0.7), (0.7, 0.7)]),
    ({"blocks.*": [1, 2], "head.*": 3}, [(1, 2), (1, 2), (3, 3)]),
    ([0.5, {"head.*": 0, "*": -1}], [(0.5, -1), (0.5, -1), (0.5, 0)]),
])
def test_weights_are_resolved_per_tensor(weight: Any, expected: list[tuple[float, float]]) -> None:
    found = list(resolve_weights(weight, KEYS, 2, "ties").values())
    assert found == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize(("weight", "message"), [
    ([1.0], r"ties: weight is \[1.0\], expected a number or 2 of them, one per member"),
    ("0.3", r"weight is '0.3', expected a number or 2"),
    ([1.0, []], r"a weight is None, expected a finite number"),
    ([1.0, "x"], r"a weight is 'x', expected a finite number"),
    ([1.0, float("nan")], r"a weight is nan, expected a finite number"),
    (True, r"a weight is True, expected a finite number"),
    ({"bloks.*": 1.0, "*": 2.0}, r"the weight pattern 'bloks.\*' decides no tensor"),
    ({"*": 2.0, "head.*": 1.0}, r"the weight pattern 'head.\*' decides no tensor: none is called "
                                r"so, or the patterns before it have them all"),
    ({"blocks.*": 1.0}, r"no weight pattern matches the tensor 'head.w'; end with '\*'"),
    ({"*": [1.0, 2.0, 3.0]}, r"weight is \[1.0, 2.0, 3.0\], expected a number or 2 of them"),
])
def test_weights_that_fit_nothing_are_refused(weight: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve_weights(weight, KEYS, 2, "ties")
