from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.attacks import ATTACKS, resolve_attack
from zoo.attacks.fgsm import fgsm
from zoo.attacks.gradients import zero_gradient_share
from zoo.attacks.pgd import pgd
from zoo.errors import DataError, OptionError, UnknownName

EPS = 0.1
each_attack = pytest.mark.parametrize("attack", [fgsm, pgd])
AnyAttack = Callable[..., Tensor]


@pytest.fixture
def network() -> nn.Module:
    """Random, and different in training mode: batch norm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
    )


@pytest.fixture
def images() -> Tensor:
    """Eight, with pixels on both ends of [0, 1]."""
    uniform = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return (1.4 * uniform - 0.2).clamp(0, 1)


LABELS = torch.arange(8) % 5


def losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return functional.cross_entropy(model(images), labels, reduction="none")


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on scikit-learn's digits, and 397 digits it has not seen."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]  # (N, 1, 8, 8)
    labels = torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(4):
        for batch in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval(), images[1400:], labels[1400:]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def reference_pgd(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, steps: int, step_size: float
) -> Tensor:
    delta = torch.zeros_like(images, requires_grad=True)
    for _ in range(steps):
        functional.cross_entropy(model(images + delta), labels).backward(inputs=[delta])
        moved = (delta + step_size * delta.grad.sign()).clamp(-eps, eps)
        delta = ((images + moved).clamp(0, 1) - images).detach().requires_grad_()
    return (images + delta).detach()


def test_fgsm_of_a_linear_model_is_the_step_known_on_paper() -> None:
    """The gradient for label 0 of logits (w·x, 0) is -(1 - p₀)·w, so every pixel goes against w."""
    weight = torch.tensor([2.0, -1.0, 0.5, 0.0])
    model = nn.Linear(4, 2, bias=False)
    model.weight.data = torch.stack([weight, torch.zeros(4)])
    image = torch.tensor([[0.5, 0.5, 0.05, 0.5]])
    expected = torch.tensor([[0.4, 0.6, 0.0, 0.5]])  # the third is clipped, the fourth not moved
    torch.testing.assert_close(fgsm(model, image, torch.tensor([0]), eps=0.1), expected)


@each_attack
@pytest.mark.parametrize("eps", [0.0, 8 / 255, EPS, 1.0])
def test_stays_in_the_ball_and_in_the_pixel_range(
    attack: AnyAttack, network: nn.Module, images: Tensor, eps: float
) -> None:
    adversarial = attack(network, images, LABELS, eps=eps)
    assert adversarial.shape == images.shape
    assert (adversarial - images).abs().max() <= eps + 1e-7
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@each_attack
def test_only_looks_at_the_model(attack: AnyAttack, network: nn.Module, images: Tensor) -> None:
    """Mixed modes come back, statistics, gradients and requires_grad stay, even when it fails."""
    network.train()
    network[1].eval()
    network[6].weight.requires_grad_(False)
    network[0].weight.grad = torch.full_like(network[0].weight, 7)
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    before = images.clone()

    attack(network, images, LABELS, eps=EPS)
    with pytest.raises(IndexError, match="Target 99 is out of bounds"):
        attack(network, images, torch.full((8,), 99), eps=EPS)

    assert [module.training for module in network.modules()] == modes
    torch.testing.assert_close(dict(network.state_dict()), state, rtol=0, atol=0)
    gradients = {key: value.grad for key, value in network.named_parameters()}
    assert (gradients.pop("0.weight") == 7).all()
    assert set(gradients.values()) == {None}
    assert [key for key, value in network.named_parameters() if not value.requires_grad] == [
        "6.weight"]
    assert images.equal(before)


@each_attack
def test_attacks_the_model_in_evaluation_mode(
    attack: AnyAttack, network: nn.Module, images: Tensor
) -> None:
    evaluated = attack(network.eval(), images, LABELS, eps=EPS)
    assert attack(network.train(), images, LABELS, eps=EPS).equal(evaluated)


@each_attack
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_works_where_the_caller_turned_gradients_off(
    attack: AnyAttack, network: nn.Module, images: Tensor, context: Callable[[], Any]
) -> None:
    expected = attack(network, images, LABELS, eps=EPS)
    with context():
        adversarial = attack(network, images.clone(), LABELS.clone(), eps=EPS)
    assert adversarial.equal(expected)


@each_attack
def test_is_computed_in_float32_under_autocast_and_for_half_images(
    attack: AnyAttack, network: nn.Module, images: Tensor
) -> None:
    expected = attack(network, images, LABELS, eps=EPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attack(network, images, LABELS, eps=EPS).equal(expected)
    assert attack(network, images.bfloat16(), LABELS, eps=EPS).dtype is torch.float32


@each_attack
def test_log_probabilities_are_as_good_as_logits(
    attack: AnyAttack, network: nn.Module, images: Tensor
) -> None:
    expected = attack(network, images, LABELS, eps=EPS)
    model = nn.Sequential(network, nn.LogSoftmax(dim=1))
    torch.testing.assert_close(attack(model, images, LABELS, eps=EPS), expected)


@each_attack
def test_a_batch_without_images_is_no_error(attack: AnyAttack, network: nn.Module) -> None:
    none = torch.zeros(0, 3, 6, 6)
    assert attack(network, none, torch.zeros(0, dtype=torch.int64), eps=EPS).shape == none.shape


def test_pgd_is_a_function_of_its_seed_alone(network: nn.Module, images: Tensor) -> None:
    first = pgd(network, images, LABELS, eps=EPS, steps=2, seed=3)
    state = torch.get_rng_state()
    assert pgd(network, images, LABELS, eps=EPS, steps=2, seed=3).equal(first)
    assert not pgd(network, images, LABELS, eps=EPS, steps=2, seed=4).equal(first)
    assert torch.get_rng_state().equal(state)


def test_pgd_climbs_higher_than_fgsm(network: nn.Module, images: Tensor) -> None:
    clean = losses(network, images, LABELS).mean()
    one_step = losses(network, fgsm(network, images, LABELS, eps=EPS), LABELS).mean()
    many_steps = losses(network, pgd(network, images, LABELS, eps=EPS), LABELS).mean()
    assert clean < one_step <= many_steps


def test_restarts_keep_the_worst_of_each_image(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    """One restart on the same images is the first of many, so a second can only add to it."""
    model, images, labels = digits
    images, labels = images[:100], labels[:100]
    options: dict[str, Any] = {"eps": EPS, "steps": 1, "step_size": 0.02}
    once = pgd(model, images, labels, **options)
    often = pgd(model, images, labels, **options, restarts=20)
    fooled_once = model(once).argmax(1) != labels
    fooled_often = model(often).argmax(1) != labels
    assert often[fooled_once].equal(once[fooled_once])
    assert fooled_often.sum() > fooled_once.sum()
    kept = ~fooled_often
    gained = losses(model, often, labels)[kept] - losses(model, once, labels)[kept]
    assert gained.min() >= 0
    assert (gained > 0).sum() > 10


class Cliff(nn.Module):
    """Right by a hair where the pixel is dark, wrong by a hair where it is bright, which costs
    less loss, as the doubt is between two classes and not ten."""

    def forward(self, images: Tensor) -> Tensor:
        right, wrong = torch.zeros(10), torch.zeros(10)
        right[0], wrong[0], wrong[1] = 0.1, 5.0, 5.1
        return torch.where(images > 0.5, wrong, right)


def test_a_misclassified_restart_is_worse_than_one_with_more_loss() -> None:
    images, labels = torch.full((64, 1), 0.5), torch.zeros(64, dtype=torch.int64)
    fooled_once = pgd(Cliff(), images, labels, eps=EPS, steps=1) > 0.5
    assert 0 < fooled_once.sum() < 64
    assert (pgd(Cliff(), images, labels, eps=EPS, steps=1, restarts=20) > 0.5).all()


def test_agrees_with_an_independent_reference(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = digits
    for adversarial, reference in (
        (fgsm(model, images, labels, eps=EPS),
         reference_pgd(model, images, labels, EPS, 1, EPS)),
        (pgd(model, images, labels, eps=EPS, random_start=False),
         reference_pgd(model, images, labels, EPS, 10, 0.025)),
    ):
        # Where rounding flips the sign of a tiny gradient, a whole path can differ.
        assert (adversarial - reference).abs().gt(1e-5).float().mean() < 0.01
        assert accuracy(model, adversarial, labels) == pytest.approx(
            accuracy(model, reference, labels), abs=0.005)


def test_attacks_on_real_digits(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = digits
    clean = accuracy(model, images, labels)
    one_step = accuracy(model, fgsm(model, images, labels, eps=EPS), labels)
    many_steps = accuracy(model, pgd(model, images, labels, eps=EPS, steps=20), labels)
    assert clean > 0.85
    assert one_step < clean - 0.1
    assert many_steps < one_step
    assert accuracy(model, pgd(model, images, labels, eps=1.0, steps=20), labels) == 0
    assert zero_gradient_share(model, images, labels) == 0


class Rounded(nn.Module):
    """Masks the gradient of the first half of a batch by rounding it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        half = len(images) // 2
        return self.model(torch.cat([images[:half].round(), images[half:]]))


class Vote(Rounded):
    """Has no gradient at all."""

    def forward(self, images: Tensor) -> Tensor:
        return functional.one_hot(self.model(images).argmax(1), 5).float()


class ScaledVote(Vote):
    """Has a gradient, to a parameter and not to the pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.model[0].weight.sum()


class RootAtZero(Rounded):
    """Has a gradient that is not a number: 0 · ∞."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + (0 * images).sqrt())


@pytest.mark.parametrize(("wrapper", "share"), [
    (Rounded, 0.5), (Vote, 1.0), (ScaledVote, 1.0), (RootAtZero, 1.0),
])
def test_a_masked_gradient_is_counted_and_is_no_error(
    network: nn.Module, images: Tensor, wrapper: type[Rounded], share: float
) -> None:
    model = wrapper(network)
    with torch.inference_mode():
        assert zero_gradient_share(model, images, LABELS) == share
    adversarial = fgsm(model, images, LABELS, eps=EPS)
    unmoved = (adversarial == images).flatten(1).all(dim=1).double().mean()
    assert unmoved == share


@each_attack
@pytest.mark.parametrize("eps", [-0.1, 8, float("nan")])
def test_eps_off_the_pixel_range_is_refused(
    attack: AnyAttack, network: nn.Module, images: Tensor, eps: float
) -> None:
    with pytest.raises(OptionError) as caught:
        attack(network, images, LABELS, eps=eps)
    assert str(caught.value) == (
        f"{attack.__name__}: the option 'eps' is {eps}, expected 0 to 1, the range of a pixel "
        "(8 of 255 levels are 0.0314)")


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 0}, "pgd: the option 'steps' is 0, expected at least 1"),
    ({"restarts": 0}, "pgd: the option 'restarts' is 0, expected at least 1"),
    ({"step_size": -0.1}, "pgd: the option 'step_size' is -0.1, expected more than 0"),
    ({"restarts": 2, "random_start": False}, "pgd: 2 restarts from the same point are one; leave"),
])
def test_pgd_options_out_of_range_are_refused(
    network: nn.Module, images: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        pgd(network, images, LABELS, eps=EPS, **options)


@each_attack
@pytest.mark.parametrize(("change", "message"), [
    (lambda images: 2 * images - 1, "on [0, 1], and these are torch.float32 from -1 to 1; scale"),
    (lambda images: (255 * images).byte(), "on [0, 1], and these are torch.uint8 from 0 to 255"),
    (lambda images: images / 0, "on [0, 1], and these are torch.float32 from nan to nan"),
])
def test_images_off_the_pixel_range_are_refused(
    attack: AnyAttack, network: nn.Module, images: Tensor,
    change: Callable[[Tensor], Tensor], message: str,
) -> None:
    with pytest.raises(DataError) as caught:
        attack(network, change(images), LABELS, eps=EPS)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ATTACKS)
def test_each_name_leads_to_its_attack(name: str, network: nn.Module, images: Tensor) -> None:
    attack = {"fgsm": fgsm, "pgd": pgd}[name]
    found = resolve_attack(name, {"eps": EPS})
    assert found(network, images, LABELS).equal(attack(network, images, LABELS, eps=EPS))


def test_options_and_seed_reach_the_attack(network: nn.Module, images: Tensor) -> None:
    found = resolve_attack("pgd", {"eps": EPS, "steps": 3, "restarts": 2}, seed=5)
    assert found(network, images, LABELS).equal(
        pgd(network, images, LABELS, eps=EPS, steps=3, restarts=2, seed=5))


@pytest.mark.parametrize(("name", "message"), [
    ("pdg", "no attack is called 'pdg'; did you mean 'pgd'?"),
    ("square", "no attack is called 'square'; there are fgsm, pgd"),
])
def test_an_unknown_attack_is_an_error(name: str, message: str) -> None:
    with pytest.raises(UnknownName) as caught:
        resolve_attack(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(("options", "message"), [
    ({"eps": EPS, "step": 3}, "pgd: no option is called 'step'; did you mean 'steps'?; its options "
                              "are eps, steps, step_size, restarts, random_start"),
    ({}, "pgd: the option 'eps' must be given; its options are eps, steps"),
    ({"eps": "8/255"}, "pgd: the option 'eps' is '8/255': input should be a valid number"),
])
def test_options_are_checked_before_any_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_attack("pgd", options)
    assert str(caught.value).startswith(message)


def test_the_names_cost_no_torch() -> None:
    code = "import sys; from zoo.attacks import ATTACKS; print(*ATTACKS, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "fgsm pgd False\n"
