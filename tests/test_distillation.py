"""Learning from other networks: the formulas, unlike teachers, images without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import zoo
from zoo.backbones.mnist_cnn import MnistCnn
from zoo.datasets import ImageData, load_data
from zoo.errors import DataError, OptionError
from zoo.model import Model
from zoo.training.loop import Loop
from zoo.training.losses import criterion
from zoo.training.settings import Settings
from zoo.training.streams import Stream
from zoo.transfers.distill import confidence, distill, divergence, soft_targets
from zoo.transfers.feature_distill import Agglomeration, feature_distill
from zoo.transfers.objective import Batch, Taught

CLASSES = ("a", "b", "c")
LOSS = criterion("cross_entropy")
METHODS = ("distill", "self_distill", "feature_distill")


def net(seed: int = 0, classes: Any = CLASSES, side: int = 8, **options: Any) -> Model:
    return zoo.backbone("mnist_cnn", classes=classes, image_size=side, device="cpu", seed=seed,
                        **options)


def images(n: int = 48, seed: int = 0, side: int = 8) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.rand(n, 3, side, side, generator=generator) * 0.8
    pixels[torch.arange(n), labels] += 0.2
    return ImageData(pixels, labels, CLASSES)


def taught_batch(*logits: Tensor) -> Batch:
    pixels, labels = images(len(logits[0])).batch(range(len(logits[0])))
    return Batch(labels=labels, images=pixels,
                 taught=tuple(Taught(torch.zeros(len(each), 1), each) for each in logits))


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gap(a: Model, b: Model) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(
        a.state_dict().values(), b.state_dict().values(), strict=True))


def network(model: Model) -> MnistCnn:
    found = next(model.each_member()).net
    assert isinstance(found, MnistCnn)
    return found


# answers


def test_the_gradient_by_hand() -> None:
    """(1 - α)(softmax(z) - y) / B + αT(q - p) / B, on the logits z."""
    model, alpha, t = net(), 0.7, 5.0
    teachers = [torch.randn(12, 3, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    objective = distill(model, criterion=LOSS, teachers=[net(1), net(2)], temperature=t,
                        alpha=alpha, weights=[3, 1])
    given = taught_batch(*teachers)
    assert given.images is not None
    objective(given).backward()
    with torch.no_grad():
        embedding = model.embed(given.images)
        z = model.classify(embedding)
        p = 0.75 * (teachers[0] / t).softmax(1) + 0.25 * (teachers[1] / t).softmax(1)
        wanted = ((1 - alpha) * (z.softmax(1) - functional.one_hot(given.labels, 3))
                  + alpha * t * ((z / t).softmax(1) - p)) / 12
    head = network(model).fc2
    assert isinstance(head, nn.Linear)
    assert head.bias.grad is not None
    assert head.weight.grad is not None
    assert torch.allclose(head.bias.grad, wanted.sum(0), atol=1e-6)
    assert torch.allclose(head.weight.grad, wanted.T @ embedding, atol=1e-6)


def test_the_gradient_does_not_fade_with_the_temperature() -> None:
    """At high T it is that of matching the logits: (z - v) / (B · C), of centred ones (eq. 4)."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(12, 3, generator=generator)
    z = torch.randn(12, 3, generator=generator).requires_grad_()
    found = {}
    for t in (4.0, 20.0, 1000.0):
        wanted = soft_targets(taught_batch(v), t, (1.0,))
        (found[t],) = torch.autograd.grad(divergence(z, wanted, t), z)
    matched = ((z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))) / (12 * 3)
    assert torch.allclose(found[1000.0], matched, atol=1e-4)
    for t in (4.0, 20.0):
        assert found[t].norm() == pytest.approx(float(found[1000.0].norm()), rel=0.1)


def test_log_probabilities_soften_like_logits() -> None:
    logits = 5 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    soft = [soft_targets(taught_batch(each), 7.0, (1.0,))
            for each in (logits, logits.log_softmax(1))]
    assert torch.allclose(*soft, atol=1e-6)
    powers = logits.softmax(1) ** (1 / 7)
    assert torch.allclose(soft[0], powers / powers.sum(1, keepdim=True), atol=1e-6)


def test_confidence_by_hand() -> None:
    logits = [torch.randn(12, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    given = taught_batch(*logits)
    losses = torch.stack([-each.log_softmax(1)[torch.arange(12), given.labels] for each in logits])
    shares = confidence(given.taught, given.labels)
    assert torch.allclose(shares, (1 - losses.exp() / losses.exp().sum(0)) / 2, atol=1e-6)
    assert torch.allclose(shares.sum(0), torch.ones(12))
    assert torch.equal(shares.argmax(0), losses.argmin(0))
    assert torch.equal(confidence(given.taught[:1], given.labels), torch.ones(1, 12))
    mixed = soft_targets(given, 2.0, None)
    wanted = torch.stack([share[:, None] * (each / 2).softmax(1)
                          for share, each in zip(shares, logits, strict=True)]).sum(0)
    assert torch.allclose(mixed, wanted, atol=1e-6)
    assert torch.allclose(mixed.sum(1), torch.ones(12))


def test_one_divergence_from_the_mixture_is_the_papers_weighted_sum_of_them() -> None:
    """CA-MKD sums wₖ T² KL(teacherₖ ‖ student) over the teachers: the gradient is the same."""
    generator = torch.Generator().manual_seed(5)
    given = taught_batch(*(3 * torch.randn(12, 3, generator=generator) for _ in range(3)))
    z = torch.randn(12, 3, generator=generator).requires_grad_()
    (mine,) = torch.autograd.grad(divergence(z, soft_targets(given, 4.0, None), 4.0), z)
    shares = confidence(given.taught, given.labels)
    summed = torch.stack([
        16 * share * functional.kl_div((z / 4).log_softmax(1), (each.logits / 4).softmax(1),
                                       reduction="none").sum(1)
        for share, each in zip(shares, given.taught, strict=True)]).sum(0).mean()
    (theirs,) = torch.autograd.grad(summed, z)
    assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("weights", ["confidence", [2.0, 0.0], "uniform"])
def test_shares_decide_who_is_heard(weights: Any) -> None:
    right, wrong, student = net(1), net(2), net()
    zoo.transfer(right, images(), epochs=8, lr=0.01, batch_size=16)
    with torch.no_grad():  # the other one is sure of the next class
        wrong.load_state_dict(right.state_dict())
        head = network(wrong).fc2
        assert isinstance(head, nn.Linear)
        head.weight.copy_(head.weight.roll(1, 0))
        head.bias.copy_(head.bias.roll(1, 0))
    assert zoo.evaluate(right, images()).accuracy > 0.9
    zoo.transfer(student, images(), "distill", teachers=[right, wrong], alpha=1.0, lr=0.01,
                 weights=weights, epochs=10, batch_size=16)
    accuracy = zoo.evaluate(student, images()).accuracy
    assert (accuracy > 0.9) is (weights != "uniform"), accuracy


def test_an_update_is_a_distillation() -> None:
    a, b, teacher = net(), net(), zoo.fuse([net(1), net(2)], "mean")
    zoo.transfer(a, images(), "self_distill", teachers=[teacher], epochs=1)
    zoo.transfer(b, images(), "distill", teachers=[teacher], epochs=1, alpha=0.7)
    assert gap(a, b) == 0


def test_a_fused_trio_becomes_one_small_network() -> None:
    train, test = load_data("digits"), load_data("digits", role="test")
    members = [zoo.backbone("mnist_cnn", num_classes=10, image_size=8, device="cpu", seed=seed,
                            width=2) for seed in range(3)]
    for member in members:
        zoo.transfer(member, train, epochs=6, lr=3e-3)
    trio = zoo.fuse(members, "mean")
    small = zoo.backbone("mnist_cnn", num_classes=10, image_size=8, device="cpu", seed=9)
    zoo.transfer(small, train.without_labels(), "distill", teachers=[trio], alpha=1.0, epochs=12,
                 lr=3e-3)
    size = [sum(p.numel() for p in model.parameters()) for model in (trio, small)]
    assert size[0] > 5 * size[1]
    assert zoo.evaluate(small, test).accuracy > zoo.evaluate(trio, test).accuracy - 0.03 > 0.85


# what teachers see and are


@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_sees_what_the_student_sees(method: str) -> None:
    teacher, student = net(1), net()
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for name, model in (("teacher", teacher), ("student", student)):
        network(model).conv1.register_forward_pre_hook(
            lambda module, inputs, name=name: seen[name].append(inputs[0].clone()))
    modes: list[bool] = []
    network(teacher).conv1.register_forward_pre_hook(
        lambda module, _: modes.append(module.training))
    teacher.train()
    zoo.transfer(student, images(), method, teachers=[teacher], epochs=2, augment="basic")
    assert modes
    assert not any(modes)
    assert teacher.training
    augmented = seen["student"]
    assert len(augmented) == 2
    assert not torch.equal(augmented[0], augmented[1])
    for mine, its in zip(augmented, seen["teacher"][-2:], strict=True):
        assert torch.equal(mine, its)


def test_images_are_loaded_at_the_size_of_the_largest() -> None:
    teacher, student = net(1, side=16), net()
    data = TensorDataset(torch.rand(12, 3, 16, 16), torch.arange(12) % 3)
    data.classes = CLASSES  # type: ignore[attr-defined]
    seen: list[Tensor] = []
    network(teacher).conv1.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].clone()))
    zoo.transfer(student, data, "distill", teachers=[teacher], epochs=1)
    with torch.no_grad():
        assert torch.allclose(torch.cat(seen), next(teacher.each_member()).prepare(data.tensors[0]))


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student, whole, again = net(1), net(), net(), net()
    epoch = Loop._epoch

    def stop(self: Loop, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number)

    def train(model: Model, **more: Any) -> None:
        zoo.transfer(model, images(), method, teachers=[teacher], epochs=3, **more)

    monkeypatch.setattr(Loop, "_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(student, checkpoint=tmp_path)
    monkeypatch.setattr(Loop, "_epoch", epoch)
    before = state(teacher)
    train(again, checkpoint=tmp_path)
    train(whole)
    assert gap(again, whole) == 0
    assert gap(student, whole) > 0
    assert state(whole).keys() == state(net()).keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in state(teacher).items())
    assert all(p.grad is None for p in teacher.parameters())


# images without labels


@pytest.mark.parametrize("method", METHODS)
def test_labels_are_not_needed(method: str, tmp_path: Path) -> None:
    with_labels, without, files = net(), net(), net()
    given = {"teachers": [net(1), net(2, classes=("z", *CLASSES))], "alpha": 1.0, "epochs": 2}
    zoo.transfer(with_labels, images(), method, **given)
    result = zoo.transfer(without, images().without_labels(), method, **given)
    assert result.notes == []
    assert gap(with_labels, without) == 0
    assert gap(without, net()) > 0
    for number in range(12):
        pixels = (images()[number][0] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "list.csv").write_text("path\n0.png\n1.png\n2.png\n")
    for data in (tmp_path, tmp_path / "list.csv"):
        result = zoo.transfer(files, data, method, **given)
    assert files.recipe["transfers"][-1]["images"] == 3


def test_a_head_of_other_classes_is_replaced_by_the_teachers() -> None:
    data = images().without_labels()
    teachers = [net(1, classes=("d", "c", "a", "b")), net(2, classes=("b", "a", "c"))]
    student, some = net(classes=("x", "y")), net(classes=("b", "a"))
    result = zoo.transfer(student, data, "distill", teachers=teachers, alpha=1.0, epochs=1)
    assert student.classes == ("c", "a", "b")
    assert result.notes == ["the head was replaced: the teachers' 3 classes are not the model's 2"]
    result = zoo.transfer(some, data, "distill", teachers=teachers, alpha=1.0, epochs=1)
    assert some.classes == ("b", "a")
    assert result.notes == []


def test_a_part_of_the_teachers_classes() -> None:
    """The student learns the probabilities of its own classes among each other."""
    teacher, student = net(1, classes=("a", "b", "c", "d")), net(classes=("d", "b"))
    stream = Stream(student, images().without_labels(), Settings(), teachers=[teacher])
    given = next(stream.epoch(0, 0))
    assert given.labels.unique().tolist() == [-1]
    assert given.images is not None
    with torch.no_grad():
        probabilities = teacher(given.images).softmax(1)[:, [3, 1]]
    wanted = probabilities / probabilities.sum(1, keepdim=True)
    assert torch.allclose(soft_targets(given, 1.0, (1.0,)), wanted, atol=1e-6)


def test_labels_that_are_missing_are_told() -> None:
    student, data = net(), images().without_labels()
    for alpha in (0.5, 0.0):
        with pytest.raises(DataError, match="these data have no labels, and labels are needed"):
            zoo.transfer(student, data, "distill", teachers=[net(1)], alpha=alpha)
    with pytest.raises(OptionError, match="'weights' is 'confidence', which is measured on labels, "
                                          "and the images have none"):
        zoo.transfer(student, data, "distill", teachers=[net(1)], alpha=1.0, weights="confidence")
    with pytest.raises(OptionError, match=r"val is 0\.2, and the images that it is a share of have "
                                          "no labels; pass labelled data"):
        zoo.transfer(student, data, "distill", teachers=[net(1)], alpha=1.0, val=0.2)
    with pytest.raises(DataError, match="the teachers have no class in common"):
        zoo.transfer(student, data, "distill", alpha=1.0,
                     teachers=[net(1, classes=("x", "y")), net(2)])
    assert gap(student, net()) == 0
    result = zoo.transfer(student, data, "distill", teachers=[net(1)], alpha=1.0, epochs=1,
                          val=images(9, seed=1))
    assert "val_accuracy" in result.history[0]


# features


def features(student: Model, teachers: list[Model], **options: Any) -> Agglomeration:
    objective = feature_distill(student, criterion=LOSS, teachers=teachers, **options)
    assert isinstance(objective, Agglomeration)
    return objective


def test_features_by_hand() -> None:
    student, teachers, data = net(), [net(1), net(2, width=2)], images()
    objective = features(student, teachers, alpha=0.6, logits=0.3, temperature=2.0, weights=[1, 3])
    stream = Stream(student, data, Settings(batch_size=16), teachers=teachers)
    objective.begin(stream.everything_taught())
    given = next(stream.epoch(0, 0))
    pixels = data.batch(range(48))[0]
    assert given.images is not None
    with torch.no_grad():
        embedding = student.embed(given.images)
        logits = student.classify(embedding)
        wanted = 0.4 * LOSS(logits, given.labels)
        soft = torch.zeros(16, 3)
        for number, (share, teacher) in enumerate(zip((0.25, 0.75), teachers, strict=True)):
            every = teacher.embed(pixels)
            standard = (teacher.embed(given.images) - every.mean(0)) / (
                every.var(0, unbiased=False).mean().sqrt())
            found = objective.adaptors[number](embedding)
            assert found.shape == standard.shape
            wanted += 0.6 * share * ((found - standard).square().mean() + 1
                                     - functional.cosine_similarity(found, standard).mean())
            soft += share * (teacher(given.images) / 2).softmax(1)
        wanted += 0.3 * 4 * (soft * (soft.log() - (logits / 2).log_softmax(1))).sum(1).mean()
        assert objective(given).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_augmented_features_have_the_same_standard() -> None:
    student, teachers, data = net(), [net(1)], images()
    found = []
    for augment in (None, "basic"):
        objective = features(student, teachers)
        stream = Stream(student, data, Settings(augment=augment), teachers=teachers)
        objective.begin(stream.everything_taught())
        found.append(dict(objective.named_buffers()))
    assert found[0]["standards.0.scale"] > 0
    for name in ("standards.0.mean", "standards.0.scale"):
        assert torch.allclose(found[0][name], found[1][name], atol=1e-6)


def test_a_loud_teacher_drowns_nobody() -> None:
    """A thousand times the features teach the same."""
    quiet, loud, a, b = net(1), net(1), net(), net()
    with torch.no_grad():
        layer = network(loud).fc1
        layer.weight.mul_(1000)
        layer.bias.mul_(1000)
    for student, teacher in ((a, quiet), (b, loud)):
        zoo.transfer(student, images(), "feature_distill", teachers=[teacher, net(2)], epochs=2)
    assert gap(a, net()) > 1e-3
    assert gap(a, b) < 1e-4


@pytest.mark.parametrize("method", ["feature_distill", "finetune"])
def test_teachers_of_features_may_have_any_classes(method: str) -> None:
    a, b, other = net(), net(), net(1)
    other.classes = ("x", "y", "z")
    for student, teacher in ((a, net(1)), (b, other)):
        zoo.transfer(student, images(), method, teachers=[teacher], epochs=1)
    assert gap(a, b) == 0
    if method == "feature_distill":
        with pytest.raises(DataError, match="a teacher has no class 'a'"):
            zoo.transfer(b, images(), method, teachers=[other], logits=1.0)


@pytest.mark.parametrize("build", [net, lambda: zoo.fuse([net(), net(5)], "gated", hidden=16)])
def test_features_alone_leave_the_classifier(build: Any) -> None:
    student = build()
    zoo.transfer(student, images().without_labels(), "feature_distill",
                 teachers=[net(1, classes=("x", "y"))], alpha=1.0, epochs=1)
    before = state(build())
    same = {name for name, tensor in state(student).items() if torch.equal(before[name], tensor)}
    head = ("head.weight", "head.bias") if student.head is not None else (
        "members.0.net.fc2.weight", "members.0.net.fc2.bias")
    assert same == set(head)


@pytest.mark.parametrize("options", [
    {"alpha": 1.0}, {"alpha": 1.0, "logits": 1.0}, {"alpha": 0.5}], ids=str)
def test_what_trains_gets_a_gradient(options: dict[str, Any]) -> None:
    """Several processes would wait for one that never comes."""
    student, teachers = zoo.fuse([net(), net(5)], "concat"), [net(1)]
    objective = features(student, teachers, **options)
    objective.choose_trained()
    stream = Stream(student, images(), Settings(), teachers=teachers)
    objective(next(stream.epoch(0, 0))).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.requires_grad is (parameter.grad is not None), name


def test_features_learnt_without_labels_need_few_labels() -> None:
    """Two teachers who know half of the digits each; a student whose features tell all ten."""
    train, test = load_data("digits"), load_data("digits", role="test")
    assert train.labels is not None
    teachers = []
    for seed, half in ((1, train.labels < 5), (2, train.labels >= 5)):
        known = train.subset(half.nonzero()[:, 0])
        teachers.append(zoo.backbone("mnist_cnn", classes=train.classes, image_size=8,
                                     device="cpu", seed=seed, width=seed))
        zoo.transfer(teachers[-1], known, epochs=10, lr=3e-3)
    few, accuracy = train.take(50), []
    for epochs in (0, 20):
        student = zoo.backbone("mnist_cnn", num_classes=10, image_size=8, device="cpu", seed=0)
        if epochs:
            zoo.transfer(student, train.without_labels(), "feature_distill", teachers=teachers,
                         alpha=1.0, epochs=epochs, lr=3e-3)
        zoo.transfer(student, few, "linear_probe", epochs=100, lr=0.03)
        accuracy.append(zoo.evaluate(student, test).accuracy)
    assert accuracy[1] > accuracy[0] + 0.05, accuracy


@pytest.mark.parametrize(("method", "options", "problem"), [
    ("distill", {"teachers": []}, "zoo/distill: there is no teacher; pass teachers="),
    ("distill", {"temperature": 0.0}, "temperature is 0.0 and alpha 0.9, expected temperature > 0"),
    ("distill", {"alpha": 1.5}, "temperature is 4.0 and alpha 1.5, expected"),
    ("distill", {"weights": [1.0]}, r"'weights' is \[1.0\], expected one number for each of the 2 "
                                    "teachers, 0 or more and one of them above"),
    ("distill", {"weights": [1.0, -1.0]}, r"'weights' is \[1.0, -1.0\], expected one number"),
    ("distill", {"weights": [0, 0]}, r"'weights' is \[0.0, 0.0\], expected one number"),
    ("distill", {"weights": "best"}, "'weights' is 'best': input should be 'uniform' or 'conf"),
    ("feature_distill", {"teachers": []}, "zoo/feature_distill: there is no teacher"),
    ("feature_distill", {"alpha": -0.1}, "alpha -0.1, expected"),
    ("feature_distill", {"logits": -1.0}, "the option 'logits' is -1.0, expected 0 or more"),
    ("feature_distill", {"hidden": 0}, "the option 'hidden' is 0, expected 1 or more"),
    ("feature_distill", {"weights": []}, r"'weights' is \[\], expected one number for each"),
], ids=str)
def test_what_is_refused(method: str, options: dict[str, Any], problem: str) -> None:
    model = net()
    with pytest.raises(OptionError, match=problem):
        zoo.transfer(model, images(), method, **{"teachers": [net(1), net(2)], **options})
    assert gap(model, net()) == 0
