"""Fusions of outputs: what they compute, that they run everywhere, and what fitting promises."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import DataError, NotFitted, OptionError
from zoo.fusion.outputs.mean import Mean
from zoo.fusion.outputs.weighted import Weighted
from zoo.fusion.specs import SPECS
from zoo.registry import load

NAMED = {spec.name: spec for spec in SPECS}
BOTH = {"calibrate": True, "recalibrate": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mean", {}), ("mean", {"of": "logits"}), ("mean", BOTH), ("mean", {"exit": "exact"}),
    ("weighted", {}), ("weighted", {"recalibrate": True}),
    ("vote", {}), ("vote", {"recalibrate": True, "weights": [1.0, 0.5, 0.0]}),
    ("geometric", {}), ("geometric", {"weights": [1.0, 0.5, 0.0], **BOTH}),
    ("max", {}), ("max", BOTH),
    ("greedy_selection", {}), ("greedy_selection", {"metric": "accuracy", "start": 2, **BOTH}),
    ("stacking", {}), ("stacking", {"weights": "class", "l2": 0.1}),
    ("gate", {}), ("gate", {"hidden": 4, **BOTH}),
]
each = pytest.mark.parametrize(("name", "options"), CASES)


def held_out(seed: int = 0, members: int = 3, count: int = 200, classes: int = 4,
             skill: tuple[float, ...] = (3.0, 1.0, 0.0), heat: tuple[float, ...] = (1.0, 5.0, 2.0),
             ) -> tuple[Tensor, Tensor]:
    """Logits of members that know the label to different degrees and are sure of themselves to
    others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(members, count, classes, generator=generator)
    logits += torch.tensor(skill)[:, None, None] * nn.functional.one_hot(labels, classes)
    return logits * torch.tensor(heat)[:, None, None], labels


def empty(name: str, options: dict[str, Any], members: int = 3, classes: int = 4) -> Any:
    core = {"dims": [classes + 1] * members} if name == "gate" else {}
    return load(NAMED[name])(members, classes, **core, **options)


def built(name: str, options: dict[str, Any], members: int = 3, classes: int = 4) -> Any:
    module = empty(name, options, members, classes)
    if hasattr(module, "fit"):
        logits, labels = held_out(members=members, classes=classes)
        torch.manual_seed(0)
        module.fit(logits, labels, features=features(logits))
    return module


def features(logits: Tensor) -> list[Tensor]:
    """Of each member [N, C + 1]: something that has to do with its logits."""
    return [torch.cat([part.float().tanh(), part[:, :1].float().square()], 1) for part in logits]


def answer(module: Any, logits: Tensor) -> Tensor:
    return module(logits, features(logits))  # type: ignore[no-any-return]


def nll(log_probabilities: Tensor, labels: Tensor) -> float:
    return float(nn.functional.nll_loss(log_probabilities.double(), labels))


def test_every_fusion_of_outputs_is_in_the_table() -> None:
    assert {name for name, _ in CASES} == {spec.name for spec in SPECS if spec.kind == "outputs"}


@each
def test_the_result_is_log_probabilities(name: str, options: dict[str, Any]) -> None:
    module, (logits, _) = built(name, options), held_out(1)
    before = logits.clone()
    result = answer(module, logits)
    assert result.shape == logits.shape[1:]
    torch.testing.assert_close(result.exp().sum(1), torch.ones(len(result)))
    assert torch.equal(logits, before)
    assert answer(module, logits[:, :0]).shape == (0, 4)


@each
def test_large_logits_stay_finite(name: str, options: dict[str, Any]) -> None:
    logits = torch.zeros(3, 2, 4)
    logits[:, 0, 1], logits[:, 1, 2] = 1e4, -1e4
    result = answer(built(name, options), logits.half())
    assert result.isfinite().all()
    assert result.dtype == torch.float32


@each
def test_same_result_compiled_saved_and_without_gradients(
    name: str, options: dict[str, Any]
) -> None:
    module, (logits, _) = built(name, options), held_out(1)
    expected, given = answer(module, logits), features(logits)
    torch.compiler.reset()  # all strategies compile one `forward`, of which dynamo keeps eight
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, given), expected)
    with torch.inference_mode():
        torch.testing.assert_close(module(logits, given), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(logits, given).dtype == torch.float32
    twin = empty(name, options)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(answer(twin, logits), expected)
    assert torch.equal(answer(copy.deepcopy(twin), logits), expected)


@each
def test_what_is_fitted_is_saved_in_buffers_and_refused_before(
    name: str, options: dict[str, Any]
) -> None:
    module = empty(name, options)
    assert not list(module.parameters())
    fits = "data" in NAMED[name].uses or bool({"calibrate", "recalibrate"} & set(options))
    assert hasattr(module, "fit") == fits == ("fitted" in module.state_dict())
    if not fits:
        assert not module.state_dict()
        return
    with pytest.raises(NotFitted, match=rf"{name} has not been fitted to held-out data; make the "
                       rf"model with fuse\(…, '{name}', data=…\)"):
        answer(module, held_out()[0])
    fitted = built(name, options)
    assert fitted.fitted.dtype == torch.bool
    fitted.load_state_dict(module.state_dict())
    with pytest.raises(NotFitted):
        answer(fitted, held_out()[0])


@each
def test_fitting_again_finds_the_same(name: str, options: dict[str, Any]) -> None:
    one, (logits, labels) = built(name, options), held_out()
    if not hasattr(one, "fit"):
        return
    other = empty(name, options)
    torch.manual_seed(0)
    with torch.inference_mode():  # as evaluation may call it
        told = other.fit(logits.clone(), labels, features=features(logits))
    assert all(torch.equal(value, other.state_dict()[key])
               for key, value in one.state_dict().items())
    assert json.loads(json.dumps(told, allow_nan=False)) == told != {}


@each
def test_order_of_members(name: str, options: dict[str, Any]) -> None:
    if not NAMED[name].symmetric:
        return
    logits, labels = held_out()
    turned = {**options, "weights": options["weights"][::-1]} if isinstance(
        options.get("weights"), list) else options
    module, other = empty(name, options), empty(name, turned)
    if hasattr(module, "fit"):
        module.fit(logits, labels)
        other.fit(logits.flip(0), labels)
    torch.testing.assert_close(other(logits.flip(0)), module(logits), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "options"), [
    ("mean", {}), ("mean", {"of": "logits"}), ("geometric", {}), ("max", {}),
    ("greedy_selection", {}), ("gate", {})])
def test_copies_of_a_model_give_its_log_probabilities(name: str, options: dict[str, Any]) -> None:
    one, labels = held_out()
    copies = one[:1].expand(3, -1, -1)
    module = empty(name, options)
    if hasattr(module, "fit"):
        module.fit(copies, labels, features=features(copies))
    torch.testing.assert_close(answer(module, copies), one[0].log_softmax(1))


def test_a_mean_of_probabilities_is_not_a_mean_of_logits() -> None:
    logits, _ = held_out()
    torch.testing.assert_close(Mean(3, 4)(logits), logits.softmax(2).mean(0).log())
    torch.testing.assert_close(Mean(3, 4, of="logits")(logits), logits.mean(0).log_softmax(1))
    with pytest.raises(OptionError, match=r"mean: of is 'ranks', expected 'probabilities' or 'log"):
        Mean(3, 4, of="ranks")  # type: ignore[arg-type]


@pytest.mark.parametrize(("skill", "heat"), [
    ((3.0, 1.0, 0.0), (1.0, 5.0, 2.0)),
    ((2.0, 2.0, 2.0), (0.2, 1.0, 9.0)),
    ((9.0, 0.0, 0.0), (1.0, 9.0, 9.0)),
    ((-2.0, 0.0, 0.1), (4.0, 1.0, 1.0)),
    ((50.0, 50.0, 50.0), (9.0, 9.0, 9.0)),
])
def test_fitting_never_loses_to_the_mean_or_the_best_member(
    skill: tuple[float, ...], heat: tuple[float, ...]
) -> None:
    logits, labels = held_out(skill=skill, heat=heat)
    module = Weighted(3, 4)
    module.fit(logits, labels)
    found = nll(module(logits), labels)
    temperatures = torch.logspace(-2, 2, 400, dtype=torch.float64)[:, None, None]
    best_calibrated = min(
        nll((one.double() / heat).log_softmax(1), labels) for one in logits
        for heat in temperatures)
    assert found <= nll(Mean(3, 4)(logits), labels) + 1e-6
    assert found <= best_calibrated + 1e-6
    assert module.weights.sum().item() == pytest.approx(1)
    assert (module.weights >= 0).all()
    assert ((module.temperatures >= 0.01) & (module.temperatures <= 100)).all()


def test_fitting_falls_back_on_one_member_where_the_descent_ends_above_it() -> None:
    logits, labels = held_out(212, count=50, skill=(3.0, -3.0, 0.0), heat=(0.2, 0.01, 100.0))
    module, alone = Weighted(3, 4), Weighted(1, 4)
    module.fit(logits, labels)
    alone.fit(logits[:1], labels)
    assert module.weights.tolist() == [1, 0, 0]
    torch.testing.assert_close(module(logits), alone(logits[:1]), atol=1e-3, rtol=1e-3)


def test_fitting_finds_the_temperature() -> None:
    """Labels drawn from a softmax whose logits are then made five times too large."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    module = Weighted(1, 4)
    module.fit(5 * logits[None], labels)
    assert module.temperatures.item() == pytest.approx(5, rel=0.05)
    assert module.weights.item() == 1


def test_fitting_leaves_out_who_knows_nothing() -> None:
    logits, labels = held_out(count=5000, skill=(3.0, 3.0, 0.0), heat=(1.0, 5.0, 1.0))
    module = Weighted(3, 4)
    module.fit(logits, labels)
    assert module.weights[2] < 0.01
    assert module.weights[:2].min() > 0.4


def test_fitting_is_repeatable_and_saved() -> None:
    logits, labels = held_out()
    one, other = Weighted(3, 4), Weighted(3, 4)
    one.fit(logits, labels)
    with torch.inference_mode():  # as evaluation may call it
        other.fit(logits.clone(), labels)
    assert all(torch.equal(value, other.state_dict()[key])
               for key, value in one.state_dict().items())
    assert set(one.state_dict()) == {"temperatures", "weights", "fitted"}
    assert one.fitted.dtype == torch.bool
    assert not list(one.parameters())


@pytest.mark.parametrize(("logits", "labels", "message"), [
    (torch.zeros(2, 5, 4), torch.zeros(5).long(),
     r"logits are \[2, 5, 4\], expected \[3, N, 4\]: members, images, classes"),
    (torch.zeros(3, 5, 4), torch.zeros(6).long(),
     r"labels are \[6\], expected \[5\], one per image and at least one"),
    (torch.zeros(3, 0, 4), torch.zeros(0).long(), r"labels are \[0\], expected \[0\], one per"),
    (torch.zeros(3, 1, 4), torch.tensor([4]), r"labels run from 4 to 4, expected 0 to 3"),
    (torch.full((3, 1, 4), torch.nan), torch.tensor([0]), r"some logits are not finite"),
])
def test_data_that_cannot_be_fitted(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Weighted(3, 4).fit(logits, labels)
