"""Running the members of a model: shared resizing, and the ways of `zoo.speed_up`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import zoo
from zoo import inference
from zoo.backbones.pixels import Pictures
from zoo.errors import OptionError
from zoo.inference import SideBySide, Stacked, alike
from zoo.model import Model


def net(name: str = "timm/test_resnet", seed: int = 0, size: int = 32) -> Model:
    return zoo.backbone(name, num_classes=4, image_size=size, seed=seed, device="cpu")


@pytest.fixture
def like() -> Model:
    """Three of one kind, and one of another between them."""
    return zoo.fuse([net(seed=1), net("timm/test_vit"), net(seed=2), net(seed=3)], "mean")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def answer(model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(images)
    return found


def take(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a way win, whatever the clock says."""
    def fastest(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
        seconds = [1.0] * len(runs)
        ways = ("as given", "one after another", "stacked", "side by side")
        if len(runs) == len(ways):
            seconds[ways.index(name)] = 0.5
        return seconds

    monkeypatch.setattr(inference, "_fastest", fastest)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("way", ["as given", "one after another", "stacked", "side by side"])
def test_every_way_answers_as_the_plain_one(
    like: Model, images: Tensor, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = answer(like, images)
    take(monkeypatch, way)
    speed = zoo.speed_up(like, batch_size=2)
    assert speed.chosen == way
    assert speed.gain == (1 if way == "as given" else 2)
    assert speed.as_dict()["seconds"].keys() == {
        "as given", "one after another", "stacked", "side by side"}
    assert (like.way is None) == (way == "as given")
    torch.testing.assert_close(answer(like, images), wanted, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(like(images), wanted, rtol=1e-4, atol=1e-5)


def test_like_members_are_found() -> None:
    other = net(seed=3)
    other.set_activation("elu")
    members = [next(model.each_member()) for model in (
        net(seed=1), net("timm/test_vit"), net(seed=2), other, net(size=48))]
    assert alike(members) == [[0, 2], [1], [3], [4]]
    deep = zoo.fuse([net(seed=1), net(seed=2), net(seed=3)], "concat",
                    layer=["layer1", "layer2", "layer1"])
    assert alike(list(deep.each_member())) == [[0, 2], [1]]


def test_stacked_weights_follow_the_members(
    like: Model, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(monkeypatch, "stacked")
    zoo.speed_up(like)
    before = answer(like, images)
    like.load_state_dict({key: tensor * 0.5 for key, tensor in like.state_dict().items()})
    assert isinstance(like.way, Stacked)
    found = answer(like, images)
    like.way = None
    torch.testing.assert_close(found, answer(like, images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before)


def test_a_way_is_for_evaluation_without_gradients_on_this_device(
    like: Model, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(monkeypatch, "side by side")
    zoo.speed_up(like)
    assert isinstance(like.way, SideBySide)
    like(images).sum().backward()
    assert all(parameter.grad is not None for parameter in like.parameters())
    twin = copy.deepcopy(like)
    assert twin.way is None
    torch.testing.assert_close(answer(twin, images), answer(like, images))
    assert like.double().way is None


def test_a_way_that_answers_otherwise_is_not_taken(
    like: Model, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = answer(like, images)
    monkeypatch.setattr(SideBySide, "run", lambda self, members, act, pictures: [
        getattr(member, act)(pictures) + 1.0 * number for number, member in enumerate(members)])
    monkeypatch.setattr(Stacked, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("no rule")))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert zoo.speed_up(like).seconds.keys() == {"as given", "one after another"}
    torch.testing.assert_close(answer(like, images), wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_for_those_who_ask(like: Model, images: Tensor,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def half_wins(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
        return [1 / (1 + index) for index in range(len(runs))]

    wanted = answer(like, images)
    monkeypatch.setattr(inference, "_fastest", half_wins)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert zoo.speed_up(like).bfloat16 == ()
    torch.testing.assert_close(answer(like, images), wanted, rtol=1e-4, atol=1e-5)
    speed = zoo.speed_up(like, precision="bfloat16")
    assert speed.bfloat16 == (0, 1, 2, 3)
    found = answer(like, images)
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_the_layout_of_convolutions_is_chosen_for_each_member(
    like: Model, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_fastest", lambda runs, device: [
        1 / (1 + index) for index in range(len(runs))])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    wanted = answer(like, images)
    speed = zoo.speed_up(like)
    assert speed.channels_last == (0, 1, 2, 3)
    assert all(parameter.is_contiguous(memory_format=torch.channels_last)
               for parameter in like.parameters() if parameter.ndim == 4)
    torch.testing.assert_close(answer(like, images), wanted, rtol=1e-4, atol=1e-5)


def test_it_can_be_trained_and_attacked_afterwards(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.fuse([net(seed=1), net(seed=2)], "mean")
    def fastest(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
        return [1.0, 0.5, 2.0, 2.0][:len(runs)]  # the channels last, and one after another

    monkeypatch.setattr(inference, "_fastest", fastest)
    assert zoo.speed_up(model, batch_size=3).channels_last == (0, 1)
    model(images.requires_grad_()).sum().backward()
    assert images.grad is not None
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


def test_a_network_that_has_diverged_stays_as_it_is() -> None:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert zoo.speed_up(model, batch_size=2).chosen == "as given"


def test_what_cannot_be_meant(like: Model) -> None:
    with pytest.raises(OptionError, match="batch_size is 0, expected 1 or more"):
        zoo.speed_up(like, batch_size=0)
    with pytest.raises(OptionError, match="precision is 'int8', expected 'float32' or 'bfloat16'"):
        zoo.speed_up(like, precision="int8")
    with pytest.raises(zoo.ZooError, match=r"measures a zoo\.Model"):
        zoo.speed_up("like")  # type: ignore[arg-type]


def test_one_network_and_fused_members_run_too(images: Tensor) -> None:
    inner = zoo.fuse([net(seed=1), net("timm/test_vit")], "concat")
    for model in (net(), zoo.fuse([inner, net(seed=2)], "mean")):
        wanted = answer(model, images)
        zoo.speed_up(model, batch_size=2)
        torch.testing.assert_close(answer(model, images), wanted, rtol=1e-4, atol=1e-5)


def test_images_are_resized_once_for_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    resize = functional.interpolate

    def counted(x: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
        sizes.append(size)
        return resize(x, size, **options)

    inner = zoo.fuse([net(seed=1), net(seed=2, size=48)], "mean")
    model = zoo.fuse([inner, net(seed=3), net(seed=4, size=48)], "mean")
    monkeypatch.setattr("zoo.backbones.pixels.functional.interpolate", counted)
    pixels = torch.rand(2, 3, 40, 40)
    shared = answer(model, pixels)
    assert sorted(sizes) == [(32, 32), (48, 48)]
    alone = torch.stack([answer(one, pixels) for one in (inner, net(seed=3), net(seed=4, size=48))])
    torch.testing.assert_close(shared, alone.log_softmax(-1).logsumexp(0) - torch.tensor(3).log())


def test_pictures_want_images() -> None:
    with pytest.raises(zoo.ZooError, match="expected float"):
        Pictures(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
