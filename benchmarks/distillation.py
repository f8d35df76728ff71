"""Hinton's experiment on MNIST in shape (arXiv:1503.02531, section 3): a large network with
dropout, a limit on weights and jittered images teaches a small one without any of them; then the
same with no image of a 3 in the transfer set. Errors on the 10,000 test images.

    OMP_NUM_THREADS=1 nice python benchmarks/distillation.py --seeds 0 1

In the paper: teacher 67 errors, student alone 146, distilled at T = 20 74, without a 3 206, and 109
with the bias of that class raised.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

import zoo
from zoo.backbones import Preprocessing
from zoo.blueprints import Blueprint
from zoo.building import member_of, seeded
from zoo.datasets import ImageData, load_data

CLASSES = tuple("0123456789")
THREE = 3
SIDE = 28


class Mlp(nn.Module):
    """Two hidden layers of rectified units, with timm's semantics.

    drop: of hidden units; inputs have 0.2 of it where there is any. most: largest norm of a hidden
    unit's incoming weights. jitter: pixels by which an image moves at most while training.
    """

    def __init__(self, width: int, *, drop: float, most: float | None, jitter: int) -> None:
        super().__init__()
        self.num_features = width
        self.most, self.jitter = most, jitter
        self.seen = nn.Dropout(0.2 if drop else 0.0)
        self.drop = nn.Dropout(drop)
        self.fc1 = nn.Linear(SIDE * SIDE, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3: nn.Module = nn.Linear(width, len(CLASSES))
        self.preprocessing = Preprocessing((0.0,), (1.0,), (SIDE, SIDE))

    def forward_features(self, x: Tensor) -> Tensor:
        if self.training and self.jitter:
            x = moved(x, self.jitter)
        if self.training and self.most:
            with torch.no_grad():
                for layer in (self.fc1, self.fc2):
                    norms = layer.weight.norm(dim=1, keepdim=True)
                    layer.weight.mul_((self.most / norms).clamp(max=1))
        x = self.drop(self.fc1(self.seen(x.flatten(1))).relu())  # (B, width)
        return self.drop(self.fc2(x).relu())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.fc3(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc3

    def reset_classifier(self, num_classes: int) -> None:
        self.fc3 = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def moved(images: Tensor, most: int) -> Tensor:
    """Each image [B, 1, H, W] by a whole number of pixels of its own, up to `most` in each
    direction; zeros come in."""
    b, _, h, w = images.shape
    padded = functional.pad(images, (most,) * 4)
    down, right = torch.randint(2 * most + 1, (2, b), device=images.device)
    rows = (down[:, None] + torch.arange(h))[:, None, :, None]  # (B, 1, H, 1)
    columns = (right[:, None] + torch.arange(w))[:, None, None, :]  # (B, 1, 1, W)
    return padded[torch.arange(b)[:, None, None, None], 0, rows, columns]


def network(width: int, seed: int, *, regular: bool = False) -> zoo.Model:
    with seeded(seed):
        net = Mlp(width, drop=0.5 if regular else 0.0, most=3.0 if regular else None,
                  jitter=2 if regular else 0)
    built = Blueprint(backbone="mlp", num_classes=len(CLASSES), in_chans=1)
    return zoo.Model([member_of(net, "mlp", CLASSES, built, {})], classes=CLASSES)


@torch.no_grad()
def test_logits(model: zoo.Model, test: ImageData) -> Tensor:
    images, _ = test.batch(range(len(test)))
    return torch.cat([model(part / 255) for part in images.split(1000)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", type=int, default=60_000, help="images to train on")
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=30, help="of the students")
    parser.add_argument("--temperature", type=float, default=20.0)
    parser.add_argument("--alpha", type=float, default=0.9)
    asked = parser.parse_args()
    train = load_data("mnist", limit=asked.train)
    test = load_data("mnist", role="test")
    assert train.labels is not None
    assert test.labels is not None
    without = train.subset((train.labels != THREE).nonzero()[:, 0])
    shared = {"schedule": "cosine", "precision": "bfloat16"}
    for_teacher = {**shared, "batch_size": 250, "lr": 1e-3}
    # Chosen on the last 10,000 training images, with all networks trained on the others.
    for_students = {**shared, "batch_size": 100, "lr": 2e-3}
    soft = {"temperature": asked.temperature, "alpha": asked.alpha}

    def report(name: str, seed: int, model: zoo.Model, start: float) -> None:
        seconds = round(time.process_time() - start)
        logits = test_logits(model, test)
        # As in the paper, the bias is the best one on the test set.
        raised = {bias: logits + bias * functional.one_hot(torch.tensor(THREE), len(CLASSES))
                  for bias in (torch.arange(101) / 10).tolist()}
        wrong = {bias: each.argmax(1) != test.labels for bias, each in raised.items()}
        best = min(wrong, key=lambda bias: int(wrong[bias].sum()))
        print(json.dumps({
            "network": name, "seed": seed, "errors": int(wrong[0.0].sum()),
            "of_3s": int(wrong[0.0][test.labels == THREE].sum()), "bias": round(best, 1),
            "errors_with_bias": int(wrong[best].sum()),
            "of_3s_with_bias": int(wrong[best][test.labels == THREE].sum()),
            "cpu_seconds": seconds}, ensure_ascii=False), flush=True)

    for seed in asked.seeds:
        start = time.process_time()
        teacher = network(1200, seed, regular=True)
        zoo.transfer(teacher, train, "finetune", epochs=asked.teacher_epochs, seed=seed,
                     **for_teacher)
        report("teacher, 2 × 1200", seed, teacher, start)
        for name, data, method, options in (
            ("student alone, 2 × 800", train, "finetune", {}),
            ("distilled", train, "distill", {"teachers": [teacher], **soft}),
            ("distilled, no labels", train.without_labels(), "distill",
             {"teachers": [teacher], **soft, "alpha": 1.0}),
            ("distilled, no labels, without a 3", without.without_labels(), "distill",
             {"teachers": [teacher], **soft, "alpha": 1.0}),
        ):
            start = time.process_time()
            student = network(800, seed + 100)
            zoo.transfer(student, data, method, epochs=asked.epochs, seed=seed,
                         **for_students, **options)
            report(name, seed, student, start)


if __name__ == "__main__":
    main()
