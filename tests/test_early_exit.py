"""Early exit of fusions of outputs: later members are left out where they change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import OptionError
from zoo.fusion.outputs.exiting import Exiting
from zoo.fusion.outputs.mean import Mean
from zoo.fusion.outputs.vote import Vote
from zoo.model import Model


class Answers:
    """Members that answer row n of a batch of numbers [B, 1] with row n of their logits, and count
    the rows."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.rows = [0] * len(logits)

    def each(self) -> list[Any]:
        def answer(number: int, images: Tensor) -> Tensor:
            self.rows[number] += len(images)
            return self.logits[number, images[:, 0].long()]

        return [lambda images, n=number: answer(n, images) for number in range(len(self.logits))]


def numbered(count: int) -> Tensor:
    return torch.arange(count)[:, None].float()


def logits(heat: float, members: int = 5, count: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, count, 3, generator=generator)
    return heat * (shared + 0.7 * torch.randn(members, count, 3, generator=generator))


@pytest.mark.parametrize("heat", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("build", [
    lambda **options: Mean(5, 3, **options), lambda **options: Vote(5, 3, **options),
    lambda **options: Vote(5, 3, weights=[1.0, 2.0, 0.5, 0.0, 1.0], **options),
])
def test_exact_exit_never_changes_the_class(build: Any, heat: float) -> None:
    fuser: Exiting = build(exit="exact")
    members = Answers(logits(heat))
    answer = fuser.run(members.each(), numbered(400))
    assert torch.equal(answer.argmax(1), build()(members.logits).argmax(1))
    torch.testing.assert_close(answer.exp().sum(1), torch.ones(400))
    assert members.rows[:2] == [400, 400]  # one member of five decides nothing
    assert sorted(members.rows, reverse=True) == members.rows
    if heat > 1:
        assert members.rows[-1] < 300


@pytest.mark.parametrize("calibrated", [False, True])
def test_exact_exit_stops_as_soon_as_the_others_cannot_matter(calibrated: bool) -> None:
    """Of three sure members two agree: the third is left out. Temperatures count."""
    fuser = Mean(3, 2, exit="exact", calibrate=calibrated)
    given = torch.tensor([[[5.0, 0.0]], [[5.0, 0.0]], [[0.0, 5.0]]])
    if calibrated:
        fuser.fit(given, torch.tensor([0]))
        fuser.temperatures.fill_(5.0)  # 0.73 twice is no lead of more than one
    members = Answers(given)
    fuser.run(members.each(), numbered(1))
    assert members.rows == [1, 1, int(calibrated)]


def test_a_lead_of_exactly_what_is_left_is_none() -> None:
    """After one of two votes the other may still tie, and the mean probability decides."""
    fuser, members = Vote(2, 2, exit="exact"), Answers(torch.tensor([[[1.0, 0.0]], [[0.0, 9.0]]]))
    assert fuser.run(members.each(), numbered(1)).argmax(1).item() == 1
    assert members.rows == [1, 1]


def test_confident_exit_asks_the_next_only_where_the_first_are_unsure() -> None:
    given = torch.tensor([[[9.0, 0.0], [0.1, 0.0], [0.0, 9.0]], [[0.0, 5.0]] * 3])
    members = Answers(given)
    answer = Mean(2, 2, exit="confident", confidence=0.9).run(members.each(), numbered(3))
    assert members.rows == [3, 1]
    torch.testing.assert_close(answer[[0, 2]], given[0, [0, 2]].log_softmax(1))
    torch.testing.assert_close(answer[1], Mean(2, 2)(given)[1])


def test_an_empty_batch_has_an_empty_answer() -> None:
    members = Answers(logits(1.0))
    assert Mean(5, 3, exit="exact").run(members.each(), numbered(400)[:0]).shape == (0, 3)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Mean(2, 3, exit="soon"), "mean: exit is 'soon', expected none or exact or confident"),
    (lambda: Vote(2, 3, exit="confident", confidence=0.0), "vote: confidence is 0, expected"),
    (lambda: Mean(2, 3, of="logits", exit="exact"), "of is 'logits', which have no bound"),
    (lambda: Vote(2, 3, smoothing=1.0), r"smoothing is 1, expected a part in \(0, 1\)"),
    (lambda: Vote(2, 3, weights=[1.0]), r"weights is \[1.0\], expected 2 numbers of 0 or more"),
    (lambda: Vote(2, 3, weights=[0.0, 0.0]), "one per member and not all 0"),
])
def test_options_that_cannot_be(build: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build()


class _Counted(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.net(x)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("net", "seen") else getattr(self.net, name)


def sure(seed: int) -> Model:
    model = zoo.backbone("zoo/mnist_cnn", num_classes=4, image_size=8, seed=seed, device="cpu")
    with torch.no_grad():
        for parameter in model.head_parameters():
            parameter.mul_(200)
    return model


@pytest.mark.parametrize("strategy", ["mean", "vote"])
def test_a_model_runs_its_later_members_on_fewer_images(strategy: str, tmp_path: Path) -> None:
    members = [sure(seed) for seed in (0, 0, 1)]
    exact = zoo.fuse(members, strategy, exit="exact")
    whole = zoo.fuse(members, strategy)
    images = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        zoo.save(exact, tmp_path / "model")
        assert torch.equal(zoo.load(tmp_path / "model", device="cpu")(images), exact(images))
        counted = [_Counted(member.net) for member in exact.each_member()]
        for member, net in zip(exact.each_member(), counted, strict=True):
            member.net = net
        assert torch.equal(exact(images).argmax(1), whole(images).argmax(1))
    # The first two are one: they agree, mostly by more than a third could change.
    assert [net.seen for net in counted[:2]] == [9, 9]
    assert counted[2].seen < 4
