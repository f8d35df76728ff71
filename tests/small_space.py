"""A Space of small models from a Hub on loopback, and what it has to say."""

from __future__ import annotations

from pathlib import Path

import torch
from hub import Hub
from PIL import Image

import zoo


def noise_picture() -> Image.Image:
    noise = torch.rand(40, 70, 3, generator=torch.Generator().manual_seed(1))
    return Image.fromarray((noise * 255).byte().numpy())


def seed_space(hub: Hub, folder: Path) -> None:
    """me/fused joins two networks that know different classes; me/one is a network alone."""
    nets = [zoo.backbone("test_vit", classes=classes, image_size=32, seed=seed, device="cpu")
            for seed, classes in enumerate((["cat", "dog"], ["dog", "owl"], ["cat", "owl"]))]
    for name, model in (("me/fused", zoo.fuse(nets[:2], "mean")), ("me/one", nets[2])):
        hub.store.seed(name, zoo.save(model, folder / name))


def said_of(picture: Image.Image) -> dict[str, dict[str, float]]:
    """What the models of `seed_space` say of `noise_picture`, without the app."""
    square = picture.resize((56, 32), Image.Resampling.BICUBIC).crop((12, 0, 44, 32))
    pixels = torch.tensor(list(square.tobytes())).view(1, 32, 32, 3).permute(0, 3, 1, 2) / 255
    fused, one = (zoo.load(f"hf-hub:me/{name}", device="cpu") for name in ("fused", "one"))
    names = ("timm/test_vit.r160_in1k (1)", "timm/test_vit.r160_in1k (2)", "one", "fused")
    with torch.no_grad():
        return {name: dict(zip(model.classes, model(pixels)[0].softmax(0).tolist(), strict=True))
                for name, model in zip(names, (*fused.each_member(), one, fused), strict=True)}
