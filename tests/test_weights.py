"""One table of weight strategies drives the checks that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zoo.errors import FusionError, OptionError
from zoo.fusion import stream
from zoo.fusion.align import Graph, trace
from zoo.fusion.merging import merge_states
from zoo.fusion.specs import SPECS
from zoo.fusion.stream import accepting
from zoo.fusion.weights import task_vectors
from zoo.fusion.weights.average import average
from zoo.fusion.weights.task_arithmetic import task_arithmetic
from zoo.fusion.weights.ties import ties
from zoo.fusion.weights.wise_ft import wise_ft
from zoo.options import checked
from zoo.registry import load
from zoo.specs import FusionSpec

WEIGHTS = {spec.name: spec for spec in SPECS if spec.kind == "weights"}
State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A strategy with options; `copies_give_it_back` where they make it idempotent or not."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    copies_give_it_back: bool | None = None

    @property
    def spec(self) -> FusionSpec:
        return WEIGHTS[self.name]

    @property
    def members(self) -> int:
        return self.spec.members[1] or 3

    def merge(self, states: list[State], base: State | None, **keywords: Any) -> State:
        return merge_states(states, load(self.spec), spec=self.spec, base=base,
                            options=checked(self.spec, self.options), given=given(), **keywords)


CASES = [
    Case("average"),
    Case("wise_ft"),
    Case("wise_ft", {"alpha": 1.0}, True),
    Case("task_arithmetic", {"scale": 0.4}),
    Case("task_arithmetic", {"normalise": True}, True),
    Case("ties"),
    Case("ties", {"convention": "mergekit", "density": 0.5}),
    Case("ties", {"normalise": False, "scale": 0.3}),
    Case("ties", {"density": 1.0}, True),
    Case("ties", {"density": 1.0, "convention": "mergekit"}, True),
    Case("ties", {"election": "count"}),
    Case("slerp"),
    Case("slerp", {"t": 0.3, "convention": "mergekit"}),
    Case("nuslerp"),
    Case("nuslerp", {"over": "rows"}),
    Case("multislerp"),
    Case("multislerp", {"normalise": False}, False),
    Case("karcher"),
    Case("model_stock"),
    Case("model_stock", {"over": "rows", "convention": "mergekit"}),
    Case("dare_linear"),
    Case("dare_linear", {"convention": "mergekit", "density": 0.3}),
    Case("dare_linear", {"density": 1.0, "normalise": True}, True),
    Case("dare_ties"),
    Case("dare_ties", {"convention": "mergekit", "rescale": False}),
    Case("dare_ties", {"density": 1.0}, True),
    Case("della_linear"),
    Case("della_linear", {"convention": "mergekit", "density": 0.3}),
    Case("della"),
    Case("della", {"ranks": "binned", "convention": "mergekit", "normalise": False}),
    Case("della", {"density": 1.0}, True),
    Case("breadcrumbs", {"density": 0.5, "gamma": 0.2}),
    Case("breadcrumbs"),
    Case("breadcrumbs_ties"),
    Case("breadcrumbs_ties", {"density": 1.0, "normalise": True}, True),
    Case("sce"),
    Case("sce", {"select_topk": 1.0}, True),
    Case("sce", {"convention": "mergekit"}),
    Case("pcb"),
    Case("consensus"),
    Case("consensus", {"agree": 0}),
    Case("magmax"),
    Case("lines"),
    Case("swa"),
    Case("swa", {"start": 1, "every": 2}),
    Case("ema"),
    Case("ema", {"decay": 0.5}),
    Case("tsv_m"),
    Case("tsv_m", {"rank": 1.0, "scale": 0.5}),
    Case("iso_c"),
    Case("iso_cts"),
    Case("iso_cts", {"common": 0.3}),
    Case("wudi", {"steps": 20}),
    Case("emr"),
    Case("emr", {"task": 2}),
    Case("fisher"),
    Case("fisher", {"labels_from": "expected", "normalise": False}),
    Case("fisher", {"labels_from": "true"}),
    Case("regmean"),
    Case("regmean++"),
    Case("greedy_soup"),
    Case("learned_soup"),
    Case("learned_soup", {"per": "tensor", "lr": 0.3}),
    Case("adamerging", {"steps": 5}),
    Case("adamerging", {"steps": 5, "per": "model"}),
    Case("ot_fusion"),
    Case("zipit", {}, True),
    Case("rebasin"),
    Case("rebasin", {"matching": "activations"}),
    Case("repair"),
]
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.options}")


def state(seed: int, shift: float = 0.0) -> State:
    """A small network's tensors: matrices, vectors, a scalar, half precision, batch norm, ids."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return {
        "conv.weight": draw(8, 3, 3, 3) + shift,
        "conv.bias": draw(8) + shift,
        "in_half": draw(5, 7).half() + shift,
        "in_double": draw(4).double() + shift,
        "scalar": draw(()) + shift,
        "none": torch.zeros(0, 4),
        "bn.running_mean": draw(8),
        "bn.running_var": draw(8).square() + 0.1,
        "bn.num_batches_tracked": torch.tensor(seed),
        "mask": torch.tensor([True, False]),
    }


class Network(nn.Module):
    """Takes images [B, 3, H, W] with a state's tensors; logits [B, 7]."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, affine=False)
        shapes: dict[str, tuple[int, ...]] = {
            "in_half": (5, 7), "in_double": (4,), "scalar": (), "none": (0, 4)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, images: Tensor) -> Tensor:
        features = self.bn(self.conv(images)).relu().mean((2, 3))  # (B, 8)
        last = (features[:, :4] @ self.in_double.to(features))[:, None] * torch.linspace(-1, 1, 7)
        return features[:, :5] @ self.in_half.to(features) * self.scalar + last


def given() -> dict[str, Any]:
    """What some strategies ask for: the network, images, labels, and a score of whole states."""
    net = Network().eval()
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(2, 6, 3, 5, 5, generator=draw), torch.arange(12).view(2, 6) % 7

    def score(one: State) -> float:
        judge = Network().eval()
        judge.load_state_dict(one)
        logits = torch.cat([judge(batch) for batch in images])
        return -float(nn.functional.cross_entropy(logits, labels.flatten()))

    return {"module": net, "data": images, "labels": labels, "score": score, "graph": graph()}


@cache
def graph() -> Graph:
    net = Network().eval()
    del net.none  # a trace wants tensors with something in them
    return trace(net, torch.randn(2, 3, 5, 5))


def close(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-3 if key == "in_half" else 1e-5,
                                   atol=1e-3 if key == "in_half" else 1e-6, msg=key)


def test_every_weight_strategy_is_in_the_table() -> None:
    assert {case.name for case in CASES} == set(WEIGHTS)


@all_cases
def test_keys_shapes_and_dtypes_stay_and_inputs_too(case: Case) -> None:
    states, base = [state(seed) for seed in range(case.members)], state(9)
    before = [{key: tensor.clone() for key, tensor in one.items()} for one in [*states, base]]
    result = case.merge(states, base)
    assert list(result) == list(states[0])
    for key, tensor in result.items():
        assert tensor.shape == states[0][key].shape, key
        assert tensor.dtype == states[0][key].dtype, key
        assert tensor.isfinite().all(), key
    for tensor in result.values():
        tensor.logical_not_() if tensor.dtype == torch.bool else tensor.add_(1)
    for one, old in zip([*states, base], before, strict=True):
        for key, tensor in one.items():
            assert torch.equal(tensor, old[key]), f"{key} was changed or is shared"


@all_cases
def test_same_input_same_bytes(case: Case) -> None:
    states, base = [state(seed) for seed in range(case.members)], state(9)
    first, second = case.merge(states, base), case.merge(states, base)
    assert all(torch.equal(first[key], second[key]) for key in first)


@all_cases
def test_order_of_members_and_keys(case: Case) -> None:
    states, base = [state(seed) for seed in range(case.members)], state(9)
    result = case.merge(states, base)
    if case.spec.symmetric:
        turned = case.merge(states[::-1], base)
        turned["bn.num_batches_tracked"] = result["bn.num_batches_tracked"]  # the first member's
        close(turned, result)
    if case.name == "learned_soup":
        return  # many steps of descent let the rounding of another order grow
    by_key = [dict(sorted(one.items())) for one in states]
    close(case.merge(by_key, base), dict(sorted(result.items())))


@all_cases
def test_cuts_and_threads_do_not_matter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    states, base = [state(seed) for seed in range(case.members)], state(9)
    whole = case.merge(states, base, seed=3)
    monkeypatch.setattr(stream, "_SMALL", 0)
    monkeypatch.setattr(task_vectors, "SMALL", 0)  # what a merge sees whole is not measured
    for piece, threads in ((16, 3), (100, 2)):
        monkeypatch.setattr(stream, "PIECE", piece)
        monkeypatch.setattr(stream, "MEASURED_PIECE", 2 * piece)
        monkeypatch.setattr(stream, "cores", lambda threads=threads: threads)
        close(case.merge(states, base, seed=3), whole)


@all_cases
def test_copies_of_a_model(case: Case) -> None:
    copies, base = [state(1) for _ in range(case.members)], state(9)
    result = case.merge(copies, base)
    expected = case.copies_give_it_back
    if case.spec.idempotent if expected is None else expected:
        close(result, state(1))
    elif case.name != "repair":  # the weights come back, with statistics of the data
        assert not torch.allclose(result["conv.weight"], copies[0]["conv.weight"], atol=1e-3)


@pytest.mark.parametrize("case", [case for case in CASES if "base" in case.spec.uses],
                         ids=lambda case: f"{case.name}-{case.options}")
def test_members_like_the_base_give_the_base(case: Case) -> None:
    result = case.merge([state(9) for _ in range(case.members)], state(9))
    close(result, state(9))


@all_cases
def test_every_option_is_described(case: Case) -> None:
    from zoo.options import options_of

    assert all(option.help for option in options_of(case.spec))


def test_average_is_the_weighted_mean() -> None:
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])]
    mean = average(tensors, base=None, key="k", weight=[1.0, 3.0])
    torch.testing.assert_close(mean, torch.tensor([3.25, 6.5]))
    beyond = average(tensors, base=None, key="k", weight=[2.0, -1.0])
    torch.testing.assert_close(beyond, torch.tensor([-2.0, -4.0]))


def test_average_of_many_and_of_large_halves() -> None:
    value = torch.tensor([1.001, -7.3], dtype=torch.float16)
    mean = average([value] * 3000, base=None, key="k", weight=[1.0] * 3000)
    assert torch.equal(mean.half(), value)
    large = torch.tensor([40_000.0], dtype=torch.float16)
    assert average([large] * 2, base=None, key="k", weight=[1.0, 1.0]).half().item() == large.item()
    opposite = average([large, -large], base=None, key="k", weight=[1.0, 1.0])
    assert opposite.item() == 0


def test_average_refuses_weights_that_sum_to_zero() -> None:
    with pytest.raises(OptionError, match=r"average: the weights \[1.0, -1.0\] of 'k' sum to zero"):
        average([torch.ones(1)] * 2, base=None, key="k", weight=[1.0, -1.0])


def test_wise_ft_is_the_line_between() -> None:
    base, tensor = torch.tensor([0.1, 0.2]), torch.tensor([0.7, -0.3])

    def point(alpha: float, factor: float = 1.0) -> Tensor:
        return wise_ft([tensor], base=base, key="k", weight=[factor], alpha=alpha)

    assert torch.equal(point(0.0), base)
    assert torch.equal(point(1.0), tensor)
    torch.testing.assert_close(point(0.25), base + 0.25 * (tensor - base))
    torch.testing.assert_close(point(0.5, 0.5), base + 0.25 * (tensor - base))


def test_wise_ft_stays_between() -> None:
    one = torch.ones(1)
    with pytest.raises(OptionError, match=r"wise_ft: alpha is 1.5, expected 0 to 1; 'task_arith"):
        wise_ft([one], base=one, key="k", weight=[1.0], alpha=1.5)
    with pytest.raises(OptionError, match=r"alpha is 0.5 times the weight 3.0 of 'k', expected"):
        wise_ft([one], base=one, key="k", weight=[3.0])


def test_task_arithmetic_adds_and_forgets() -> None:
    base = torch.tensor([1.0, 1.0])
    tensors = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 5.0])]
    added = task_arithmetic(tensors, base=base, key="k", weight=[1.0, 0.5], scale=0.5)
    torch.testing.assert_close(added, torch.tensor([1.5, 2.0]))
    forgot = task_arithmetic(tensors[1:], base=base, key="k", weight=[-1.0])
    torch.testing.assert_close(forgot, torch.tensor([1.0, -3.0]))
    normal = task_arithmetic(tensors, base=base, key="k", weight=[1.0, 0.5], normalise=True)
    torch.testing.assert_close(normal, torch.tensor([1 + 1 / 1.5, 1 + 2 / 1.5]))
    with pytest.raises(OptionError, match=r"of 'k' sum to zero; set normalise=False"):
        task_arithmetic(tensors, base=base, key="k", weight=[1.0, -1.0], normalise=True)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if WEIGHTS[name].scope != "model"])
def test_half_precision_inputs_are_widened_before_any_arithmetic(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (5, 10) if WEIGHTS[name].scope == "tensor" else (50,)
    base, *tensors = (torch.randn(shape, generator=generator).bfloat16() for _ in range(4))
    tensors = tensors[:WEIGHTS[name].members[1]]
    if WEIGHTS[name].scope != "tensor":
        base, *tensors = (tensor.flatten() for tensor in (base, *tensors))
    merge = partial(accepting(load(WEIGHTS[name])), key="k", weight=[0.3] * len(tensors),
                    offset=0, shape=(5, 10))
    wide = merge([tensor.float() for tensor in tensors], base=base.float())
    assert torch.equal(merge(tensors, base=base), wide)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "base" in WEIGHTS[name].uses
                                  and WEIGHTS[name].scope != "model"])
def test_a_missing_base_is_asked_for(name: str) -> None:
    count = WEIGHTS[name].members[0]
    with pytest.raises(FusionError, match=r"from a base model, and none is given. Pass base="):
        load(WEIGHTS[name])([torch.ones(1)] * count, base=None, key="k", weight=[1.0] * count)


def reference_ties(
    members: list[np.ndarray], base: np.ndarray, weight: list[float], density: float, scale: float
) -> np.ndarray:
    """The paper's three steps on flat vectors, entry by entry."""
    vectors = [member - base for member in members]
    for vector in vectors:
        keep = max(1, int(density * len(vector)))
        vector[np.argsort(np.abs(vector), kind="stable")[:-keep or None]] = 0
    merged = base.copy()
    for entry in range(len(base)):
        votes = [(w * vector[entry], w) for w, vector in zip(weight, vectors, strict=True)]
        sign = 1 if sum(vote for vote, _ in votes) >= 0 else -1
        agreeing = [(vote, w) for vote, w in votes if vote * sign > 0]
        if agreeing:
            total = sum(vote for vote, _ in agreeing)
            merged[entry] += scale * total / sum(w for _, w in agreeing)
    return merged


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("convention", ["paper", "mergekit"])
def test_ties_against_a_plain_reference(density: float, convention: str) -> None:
    keys = ["conv.weight", "conv.bias", "scalar"]  # unlike scales tell the two scopes apart
    scales = {"conv.weight": 0.1, "conv.bias": 1.0, "scalar": 3.0}
    states = [{key: state(seed)[key] * scales[key] for key in keys} for seed in (1, 2, 3)]
    base = {key: state(9)[key] * scales[key] for key in keys}
    options = {"density": density, "scale": 0.7, "convention": convention}
    weight = [1.0, 0.5, 2.0]
    merged = Case("ties", options).merge(states, base, weight=weight)

    def flat(one: State, chosen: list[str]) -> np.ndarray:
        return np.concatenate([one[key].double().numpy().ravel() for key in chosen])

    for chosen in [keys] if convention == "paper" else [[key] for key in keys]:
        expected = reference_ties([flat(one, chosen) for one in states], flat(base, chosen),
                                  weight, density, 0.7)
        np.testing.assert_allclose(flat(merged, chosen), expected, rtol=1e-5, atol=1e-6)


def test_ties_in_mergekits_numerics_by_hand() -> None:
    base = torch.zeros(6)
    tensors = [torch.tensor([4.0, -3.0, 2.0, 1.0, 0.5, 0.1]),
               torch.tensor([-4.0, 5.0, 2.0, 0.1, 0.1, 1.0])]
    merge = partial(ties, tensors, base=base, key="k", density=0.5, convention="mergekit")
    # Trimmed to three: [4, -3, 2, 0, 0, 0] and [-4, 5, 2, 0, 0, 0]; a zero sum counts as +.
    torch.testing.assert_close(
        merge(weight=[1.0, 1.0]), torch.tensor([4.0, 5.0, 2.0, 0.0, 0.0, 0.0]))
    # Weighted before the election: [4, -3, 2] against [-2, 2.5, 1].
    torch.testing.assert_close(
        merge(weight=[1.0, 0.5]), torch.tensor([4.0, -3.0, 2.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(
        merge(weight=[1.0, 0.5], normalise=False, scale=2.0),
        torch.tensor([8.0, -6.0, 6.0, 0.0, 0.0, 0.0]))


def test_ties_keeps_at_least_one_entry_and_all_that_are_equal() -> None:
    base = torch.zeros(5)
    one = torch.tensor([0.1, -3.0, 0.2, 0.3, 0.4])
    merged = ties([one], base=base, key="k", weight=[1.0], density=0.01)
    torch.testing.assert_close(merged, torch.tensor([0.0, -3.0, 0.0, 0.0, 0.0]))
    equal = torch.tensor([1.0, -1.0, 1.0, 0.5, 0.0])
    merged = ties([equal], base=base, key="k", weight=[1.0], density=0.2)
    torch.testing.assert_close(merged, torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0]))


def test_ties_threshold_is_exact() -> None:
    """Of values that agree in their upper 16 bits too."""
    near = 1 + torch.arange(1000) * 2.0**-23
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    merged = ties([near[order]], base=torch.zeros(1000), key="k", weight=[1.0], density=0.123)
    assert torch.equal(merged != 0, order >= 1000 - 123)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_ties_wants_a_density(density: float) -> None:
    with pytest.raises(OptionError, match=r"ties: density is .*, expected a fraction in \(0, 1\]"):
        Case("ties", {"density": density}).merge([state(1)], state(9))


def test_an_average_may_be_a_plain_sum() -> None:
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
    summed = average(tensors, key="w", weight=[0.5, 2.0], normalise=False)
    assert summed.tolist() == [6.5, 11.0]
    cancelled = average(tensors, key="w", weight=[1.0, -1.0], normalise=False)
    assert cancelled.tolist() == [-2.0, -3.0]
