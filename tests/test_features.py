from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch import nn

import zoo
from zoo import features
from zoo.datasets import ImageData
from zoo.features import evaluating, forget, take, trunk_features
from zoo.model import Model

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    forget()
    yield
    forget()


def net(seed: int = 0, **options: object) -> Model:
    return zoo.backbone("mnist_cnn", classes=CLASSES, image_size=8, device="cpu", seed=seed,
                        **options)  # type: ignore[arg-type]


def images(n: int = 10, seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    return ImageData(torch.rand(n, 3, 8, 8, generator=generator), [i % 3 for i in range(n)],
                     CLASSES)


def test_features_are_the_trunks_answers_in_order() -> None:
    model, data = net(), images(300)
    model.train()
    (kept,) = trunk_features(model, data)
    assert model.training
    with evaluating(model), torch.no_grad():
        assert torch.allclose(kept, model.trunk(data.batch(range(300))[0])[0], atol=1e-6)
    assert torch.equal(take((kept,), torch.tensor([4, 2]), torch.device("cpu"))[0], kept[[4, 2]])


def test_the_same_network_runs_once(runs: list[int]) -> None:
    source, other, data = net(0), net(1), images()
    trunk_features(source, data)
    assert len(runs) == 1
    probed = copy.deepcopy(source)
    probed.reset_classes(("x", "y"))
    trunk_features(probed, data.without_labels())
    assert len(runs) == 1, "another head, or labels, ran the trunk again"
    both = trunk_features(zoo.fuse([source, other], "concat"), data)
    assert len(runs) == 2
    assert torch.equal(both[0], trunk_features(source, data)[0])
    assert torch.equal(both[1], trunk_features(other, data)[0])
    assert len(runs) == 2


def test_what_changes_the_features_is_computed_anew(runs: list[int]) -> None:
    model, data = net(), images()
    trunk_features(model, data)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    trunk_features(model, data)
    trunk_features(model, images(seed=1))
    model.set_activation("tanh")
    trunk_features(model, data)
    model.to(torch.bfloat16)
    assert trunk_features(model, data)[0].dtype == torch.bfloat16
    assert len(runs) == 5


def test_nested_fusions_are_kept_too(runs: list[int]) -> None:
    inner = zoo.fuse([net(0), net(1)], "concat")
    outer = zoo.fuse([inner, net(2)], "concat")
    data = images()
    kept = trunk_features(outer, data)
    assert torch.equal(kept[0], trunk_features(outer, data)[0])
    assert len(runs) == 1


def test_the_oldest_goes_first(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    data = images()
    size = trunk_features(net(0), data)[0].nbytes
    monkeypatch.setattr(features, "KEEP_BYTES", 2 * size)
    trunk_features(net(1), data)
    trunk_features(net(0), data)  # used again, so that net 1 is the oldest
    trunk_features(net(2), data)
    assert len(runs) == 3
    trunk_features(net(0), data)
    assert len(runs) == 3
    trunk_features(net(1), data)
    assert len(runs) == 4


def test_more_than_there_is_room_for(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "KEEP_BYTES", 0)
    model, data = net(), images()
    assert torch.equal(trunk_features(model, data)[0], trunk_features(model, data)[0])
    assert len(runs) == 2


def test_modes_come_back_one_by_one() -> None:
    part = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    part[1].eval()
    with suppress(KeyError), evaluating(part):
        assert not part[0].training
        raise KeyError
    assert [part.training, part[0].training, part[1].training] == [True, True, False]
