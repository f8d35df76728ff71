"""Members that know different classes: one answer over all of them, joined by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import FormatError, FusionError, OptionError
from zoo.fusion.specs import SPECS
from zoo.labels import ByLabel
from zoo.model import Model

OUTPUTS = [spec.name for spec in SPECS if spec.kind == "outputs"]
EQUAL = (("cat", "dog", "bird"), ("bird", "cat", "dog"))
OVERLAPPING = (("cat", "dog"), ("dog", "bird"))
DISJOINT = (("cat", "dog"), ("bird", "fish", "cow"))
MIXED = (("cat", "dog"), ("dog", "bird"), ("bird", "cat", "dog"), ("cow", "fish"))


def parts_of(whole: Tensor, own: tuple[tuple[str, ...], ...], classes: tuple[str, ...]
             ) -> list[Tensor]:
    """Of one distribution [B, C], what members that know parts of it would say, as logits."""
    return [whole[:, [classes.index(name) for name in names]].log() for names in own]


def distributions(count: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(count, classes, generator=generator)).softmax(1)


def every(own: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in own for name in names))


@pytest.mark.parametrize("own", [
    EQUAL, OVERLAPPING, (("a", "b"), ("b", "c"), ("c", "d")), (("d", "a"), ("b", "c", "d")),
    (("a", "b", "c"), ("b", "c", "d"), ("a", "c", "d"), ("d", "b")), (("a", "b", "c"), ("c", "a")),
])
def test_parts_of_one_distribution_give_it_back(own: tuple[tuple[str, ...], ...]) -> None:
    classes = every(own)
    whole = distributions(20, len(classes))
    for answer in ByLabel(own, classes)(parts_of(whole, own, classes)):
        torch.testing.assert_close(answer.softmax(1), whole, atol=1e-5, rtol=1e-4)


def test_a_bird_is_a_bird_though_the_other_member_knows_none() -> None:
    """The first must say cat or dog; the second, which knows dogs, rules dog out."""
    by_label = ByLabel(OVERLAPPING, ("cat", "dog", "bird"))
    first, second = by_label([torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.01, 0.99]]).log()])
    # bird : dog is 99 : 1, cat : dog is 3 : 2.
    wanted = torch.tensor([[1.5, 1.0, 99.0]])
    torch.testing.assert_close(first.exp(), wanted / wanted.sum())
    torch.testing.assert_close(second.exp(), wanted / wanted.sum())


def test_where_nothing_is_shared_softmaxes_stand_side_by_side() -> None:
    one, other = torch.randn(4, 2), torch.randn(4, 3)
    joined = torch.cat([one.softmax(1), other.softmax(1)], 1) / 2
    for answer in ByLabel(DISJOINT, every(DISJOINT))([one, other]):
        torch.testing.assert_close(answer.exp(), joined)


def test_members_that_share_classes_are_one_beside_those_that_do_not() -> None:
    by_label = ByLabel(MIXED, every(MIXED))
    answers = by_label([torch.randn(6, len(names)) for names in MIXED])
    for answer in answers:
        torch.testing.assert_close(answer.exp().sum(1), torch.ones(6))
    torch.testing.assert_close(answers[3][:, 3:].exp().sum(1), torch.full((6,), 0.5))


def test_the_order_of_members_does_not_matter() -> None:
    classes = every(MIXED)
    logits = [torch.randn(6, len(names)) for names in MIXED]
    answers = ByLabel(MIXED, classes)(logits)
    turned = ByLabel(MIXED[::-1], classes)(logits[::-1])
    torch.testing.assert_close(torch.stack(turned[::-1]), torch.stack(answers))


def test_large_logits_stay_finite_and_have_gradients() -> None:
    logits = [(1e4 * torch.randn(8, len(names))).requires_grad_() for names in MIXED]
    answers = torch.stack(ByLabel(MIXED, every(MIXED))(logits))
    assert answers.isfinite().all()
    torch.testing.assert_close(answers.exp().sum(2), torch.ones(4, 8))
    (answers * torch.randn_like(answers).sign()).sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in logits)


def test_equal_labels_are_only_put_in_order() -> None:
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    one, other = ByLabel(EQUAL, EQUAL[0])([first, second])
    assert one is first
    assert torch.equal(other, second[:, [1, 2, 0]])


def net(classes: tuple[str, ...], seed: int) -> Model:
    return zoo.backbone("zoo/mnist_cnn", classes=classes, image_size=8, seed=seed, device="cpu")


class _Named(TensorDataset):
    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
        super().__init__(images, labels)
        self.classes = classes


def held_out(classes: tuple[str, ...]) -> _Named:
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return _Named(images, torch.arange(40) % len(classes), classes)


@pytest.mark.parametrize("strategy", OUTPUTS)
@pytest.mark.parametrize("own", [EQUAL, OVERLAPPING, DISJOINT, MIXED])
def test_models_with_any_labels_fuse_save_and_load(
    strategy: str, own: tuple[tuple[str, ...], ...], tmp_path: Path
) -> None:
    classes = every(own)
    members = [net(names, seed) for seed, names in enumerate(own)]
    fused = zoo.fuse(members, strategy, data=held_out(classes))
    assert fused.classes == classes
    images = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        answer = fused(images)
        torch.testing.assert_close(answer.exp().sum(1), torch.ones(5))
        assert answer.isfinite().all()
        zoo.save(fused, tmp_path / "model")
        assert torch.equal(zoo.load(tmp_path / "model", device="cpu")(images), answer)
    measured = zoo.evaluate(fused, held_out(classes))
    assert 0 < measured.nll < 10


def test_a_mean_of_disjoint_members_is_their_softmaxes_side_by_side() -> None:
    one, other = (net(names, seed) for seed, names in enumerate(DISJOINT))
    images = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        joined = torch.cat([one(images).softmax(1), other(images).softmax(1)], 1) / 2
        torch.testing.assert_close(zoo.fuse([one, other], "mean")(images).exp(), joined)


def test_a_fusion_of_unlike_labels_is_a_member_and_a_model_like_any_other() -> None:
    one, other = (net(names, seed) for seed, names in enumerate(OVERLAPPING))
    nested = zoo.fuse([zoo.fuse([one, other], "mean"), net(("fish", "dog"), 3)], "geometric")
    assert nested.classes == ("cat", "dog", "bird", "fish")
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    nested(images)[:, 3].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    half = nested.to(dtype=torch.bfloat16)
    assert half(images.detach()).isfinite().all()




def test_only_members_that_know_a_class_vote_on_it() -> None:
    """Three that know no birds say cat; the one that knows says bird: all of those who know."""
    own = (("cat", "dog"), ("cat", "dog"), ("dog", "cat"), ("dog", "bird"))
    members = [net(names, seed) for seed, names in enumerate(own)]
    for model, wanted in zip(members, ("cat", "cat", "dog", "bird"), strict=True):
        head = list(model.head_parameters())
        with torch.no_grad():
            head[0].zero_()
            head[1].copy_(torch.tensor([5.0 if name == wanted else 0.0
                                        for name in model.classes]))
    fused = zoo.fuse(members, "vote")
    with torch.no_grad():
        shares = fused(torch.rand(1, 3, 8, 8))[0].exp()
    assert fused.classes == ("cat", "dog", "bird")
    # cat 2 of 3, dog 1 of 4, bird 1 of 1.
    assert fused.classes[int(shares.argmax())] == "bird"
    assert float(shares[0] / shares[2]) == pytest.approx(2 / 3, rel=0.1)


def test_other_class_names_cannot_be_asked_for() -> None:
    members = [net(names, seed) for seed, names in enumerate(OVERLAPPING)]
    assert zoo.fuse(members, "mean", num_classes=3).classes == ("cat", "dog", "bird")
    with pytest.raises(OptionError, match="for 3 classes in the order"):
        zoo.fuse(members, "mean", num_classes=2)


def test_early_exit_needs_equal_labels() -> None:
    members = [net(names, seed) for seed, names in enumerate(OVERLAPPING)]
    with pytest.raises(FusionError, match=r"they know different classes.*Leave exit= out"):
        zoo.fuse(members, "mean", exit="exact")


def test_a_folder_whose_classes_are_not_the_members_is_damaged(tmp_path: Path) -> None:
    folder = zoo.save(zoo.fuse([net(names, 0) for names in OVERLAPPING], "mean"), tmp_path / "m")
    config = folder / "config.json"
    whole = json.loads(config.read_text("utf-8"))
    whole["zoo"]["model"]["classes"][2] = "fish"
    config.write_text(json.dumps(whole), "utf-8")
    with pytest.raises(FormatError, match="the classes are not those that the members know"):
        zoo.load(folder)
