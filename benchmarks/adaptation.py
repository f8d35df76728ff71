"""DANN from MNIST to digits blended into photos (the construction of MNIST-M, Ganin et al. 2016),
against the same training without the reversal.

python benchmarks/adaptation.py --images 10000 --epochs 20 --seed 0
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_sample_images

import zoo
from zoo.datasets import ImageData, load_data

SIDE = 28


def blended(digits: ImageData, seed: int) -> ImageData:
    """Each digit as the absolute difference to a random patch of scikit-learn's two photos."""
    photos = load_sample_images().images
    draw = np.random.RandomState(seed)
    grey, labels = digits.batch(range(len(digits)))
    images = []
    for digit in grey[:, 0].numpy():
        photo = photos[draw.randint(len(photos))]
        top, left = (draw.randint(length - SIDE) for length in photo.shape[:2])
        patch = photo[top:top + SIDE, left:left + SIDE].astype(int)  # (28, 28, 3)
        images.append(np.abs(patch - digit[..., None]).astype(np.uint8))
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return ImageData(stacked, labels, digits.classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train = load_data("zoo/mnist", split="train")
    test = load_data("zoo/mnist", split="test").take(2_000)
    source = train.take(given.images)
    target = blended(train.take(given.images, seed=5), seed=1)
    target_test = blended(test, seed=2)
    for strength in (0.0, 1.0):
        model = zoo.backbone("zoo/mnist_cnn", num_classes=10, width=2, seed=given.seed)
        result = zoo.transfer(model, source, "dann", unlabelled=target, strength=strength,
                              epochs=given.epochs, schedule="cosine", seed=given.seed)
        clean, shifted = (zoo.evaluate(model, data).accuracy for data in (test, target_test))
        print(f"strength {strength:g}: source {clean:.1%}, target {shifted:.1%}, "
              f"{result.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
