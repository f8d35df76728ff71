"""What a third party's fusion of weights is given when it asks: network, images, labels, score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import DataError, FusionError
from zoo.model import Model

PLUGIN = '''
import zoo

SEEN = {}

@zoo.hookimpl
def zoo_fusions():
    common = dict(kind="weights", scope="model", summary="s")
    return [
        zoo.FusionSpec(name="best", build="zoo_acme:best", uses={"score"}, **common),
        zoo.FusionSpec(name="likely", build="zoo_acme:likely", uses={"module", "data", "labels"},
                       **common),
        zoo.FusionSpec(name="looks", build="zoo_acme:looks", can_use={"data", "module", "base"},
                       **common),
        zoo.FusionSpec(name="may", build="zoo_acme:may", uses={"data", "module"},
                       can_use={"labels", "score"}, **common),
        zoo.FusionSpec(name="tells", build="zoo_acme:tells", kind="weights", summary="s"),
    ]

def best(states, *, weights, score):
    """The member that scores best."""
    SEEN["scores"] = [score(state) for state in states]
    return max(states, key=score)

def likely(states, *, weights, module, data, labels):
    """The member whose logits make the labels likeliest."""
    import torch
    def loss(state):
        total = 0.0
        for batch, truth in zip(data, labels):
            logits = torch.func.functional_call(module, state, (batch,))
            total += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
        return total
    assert not module.training
    assert set(module.state_dict()) == set(states[0])
    assert len(data) == len(labels) == len(list(data)) == len(list(data))
    SEEN["losses"] = [loss(state) for state in states]
    return min(states, key=loss)

def may(states, *, weights, data, module, labels, score):
    batch = next(iter(data))
    SEEN["may"] = (labels is None, score is None, batch.dtype, next(module.parameters()).dtype)
    module(batch)
    return states[0]

def tells(tensors, *, key, report, wrong: bool = False):
    """The first member.

    Options:
        wrong: report what is no JSON
    """
    report[key] = tensors[0] if wrong else tensors[0].numel()
    return tensors[0].clone()

def looks(states, *, weights, base, data, module):
    SEEN["looks"] = (base is None, None if data is None else next(iter(data)).shape,
                     type(module).__name__)
    return states[0]
'''


@pytest.fixture
def seen(install: Callable[..., Path]) -> Callable[[], dict[str, Any]]:
    install("acme", PLUGIN)

    def read() -> dict[str, Any]:
        import zoo_acme

        return zoo_acme.SEEN

    return read


def images(labels: bool = True) -> Any:
    """Bright and dark squares, which a network learns in an epoch or two."""
    truth = torch.arange(128) % 2
    pixels = 0.4 * torch.rand(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels += 0.6 * truth.view(-1, 1, 1, 1)
    return TensorDataset(pixels, truth) if labels else pixels


def members() -> tuple[Model, Model]:
    """One that knows the classes and one that knows nothing, with batch norm."""
    good, bad = (zoo.backbone("timm/test_resnet", num_classes=2, image_size=32, seed=seed,
                              device="cpu") for seed in (0, 1))
    zoo.transfer(good, images(), "finetune", epochs=6, lr=1e-2, batch_size=16)
    return good, bad


def same(fused: Model, member: Model) -> bool:
    one, other = (next(model.each_member()).net.state_dict() for model in (fused, member))
    return all(torch.equal(one[key], other[key]) for key in one if one[key].is_floating_point())


def test_a_strategy_chooses_by_score(seen: Callable[[], dict[str, Any]]) -> None:
    good, bad = members()
    fused = zoo.fuse([bad, good], "acme/best", data=images(), norms="pooled")
    assert same(fused, good)
    assert seen()["scores"][1] > 0.95 > seen()["scores"][0]


def test_a_strategy_runs_the_network_on_images_and_labels(
    seen: Callable[[], dict[str, Any]]
) -> None:
    good, bad = members()
    before = {key: tensor.clone() for key, tensor in bad.state_dict().items()}
    fused = zoo.fuse([bad, good], "acme/likely", data=images(), norms="pooled")
    assert same(fused, good)
    assert all(torch.equal(tensor, before[key]) for key, tensor in bad.state_dict().items())
    batch: Tensor = images().tensors[0]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(good(batch), images().tensors[1],
                                                     reduction="sum").item()
    assert seen()["losses"][1] == pytest.approx(expected, rel=1e-3)


def test_labels_are_in_the_order_of_the_models_classes(
    seen: Callable[[], dict[str, Any]]
) -> None:
    good, bad = (zoo.backbone("timm/test_resnet", classes=["1", "0"], image_size=32, seed=seed,
                              device="cpu") for seed in (0, 1))
    zoo.transfer(good, images(), "finetune", epochs=6, lr=1e-2, batch_size=16)
    zoo.fuse([bad, good], "acme/likely", data=images(), norms="pooled")
    assert seen()["losses"][1] < 0.1 * seen()["losses"][0]


def test_what_can_be_used_is_none_where_there_is_none(
    seen: Callable[[], dict[str, Any]]
) -> None:
    good, bad = members()
    zoo.fuse([good, bad], "acme/looks", norms="pooled")
    assert seen()["looks"] == (True, None, "ResNet")
    zoo.fuse([good, bad], "acme/looks", base=bad, data=images(), norms="pooled")
    assert seen()["looks"] == (False, (64, 3, 32, 32), "ResNet")


def test_what_must_be_used_and_is_not_there_is_asked_for(
    seen: Callable[[], dict[str, Any]]
) -> None:
    pair = [zoo.backbone("timm/test_resnet", num_classes=2, image_size=32, seed=seed, device="cpu")
            for seed in (0, 1)]
    with pytest.raises(FusionError, match=r"acme/best .* learns from held-out data, and none"):
        zoo.fuse(pair, "acme/best")
    unlabelled = TensorDataset(images(labels=False))
    with pytest.raises(DataError, match="label"):
        zoo.fuse(pair, "acme/best", data=unlabelled, norms="pooled")


def small(count: int = 2) -> list[Model]:
    return [zoo.backbone("zoo/mnist_cnn", num_classes=2, image_size=8, seed=seed, device="cpu")
            for seed in range(count)]


def test_labels_are_given_where_there_are_some(seen: Callable[[], dict[str, Any]]) -> None:
    pixels, truth = images().tensors
    zoo.fuse(small(), "acme/may", data=TensorDataset(pixels, truth))
    assert seen()["may"][:2] == (False, False)
    zoo.fuse(small(), "acme/may", data=TensorDataset(pixels))
    assert seen()["may"][:2] == (True, True)
    with pytest.raises(DataError, match="class"):
        zoo.fuse(small(), "acme/may", data=TensorDataset(pixels, truth + 1))


def test_the_network_computes_in_the_precision_of_the_states(
    seen: Callable[[], dict[str, Any]]
) -> None:
    fused = zoo.fuse([model.half() for model in small()], "acme/may", data=images())
    assert seen()["may"][2:] == (torch.float32, torch.float32)
    assert next(fused.parameters()).dtype == torch.float16


@pytest.mark.parametrize("norms", ["auto", "pooled", "reestimated"])
def test_networks_without_batch_norm_are_scored_too(
    seen: Callable[[], dict[str, Any]], norms: Any
) -> None:
    zoo.fuse(small(), "acme/best", data=images(), norms=norms)
    assert len(seen()["scores"]) == 2


def test_labels_that_batch_norm_needs_are_missed_before_any_work(
    seen: Callable[[], dict[str, Any]]
) -> None:
    pair = [zoo.backbone("timm/test_resnet", num_classes=2, image_size=32, seed=seed, device="cpu")
            for seed in (0, 1)]
    with pytest.raises(DataError, match="label"):
        zoo.fuse(pair, "acme/may", data=TensorDataset(images(labels=False)))
    assert "may" not in seen()
    zoo.fuse(pair, "acme/may", data=TensorDataset(images(labels=False)), norms="reestimated")
    assert seen()["may"][0]


def test_what_a_strategy_reports_stands_in_the_recipe(
    seen: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    fused = zoo.fuse(small(), "acme/tells")
    assert fused.recipe["report"]["fc2.bias"] == 2
    zoo.save(fused, tmp_path / "out")
    assert zoo.load(tmp_path / "out", device="cpu").recipe["report"] == fused.recipe["report"]
    assert "report" not in zoo.fuse(small(), "average").recipe
    with pytest.raises(FusionError, match=r"acme/tells .* what it reports is not JSON"):
        zoo.fuse(small(), "acme/tells", wrong=True)


class Counting(TensorDataset):
    """A data set that counts how often each image is asked for."""

    classes = ("0", "1")

    def __init__(self) -> None:
        super().__init__(*images().tensors)
        self.asked = 0

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        return super().__getitem__(index)


def test_data_are_opened_only_by_what_looks_at_them() -> None:
    pair = [zoo.backbone("timm/test_vit", num_classes=2, image_size=32, seed=0, device="cpu")] * 2
    data = Counting()
    zoo.fuse(pair, "average", data=data)  # without batch norm, in one basin, nothing does
    assert data.asked == 0
