"""The text of a Space's `app.py`: a program of its own, which imports zoo and gradio."""

from __future__ import annotations

from collections.abc import Mapping

_TEXT = '''"""Drop a picture, see what each member says of it and what the fused model does.

Written by `zoo space`. ZOO_MODEL=path/to/a/folder shows a model that lies on this machine instead.
"""

import functools
import os

import torch
import zoo
from zoo.datasets.fitting import fit_picture

MODEL = os.environ.get("ZOO_MODEL", @model@)
BESIDE = @beside@  # name -> address of another model to show next to it


@functools.cache
def models():
    """The fused model and those beside it, on the CPU. Nothing of a repository is run."""
    return [zoo.load(address, device="cpu") for address in (MODEL, *BESIDE.values())]


@functools.cache
def columns():
    """What each answer is called, the fused model's last."""
    fused = models()[0]
    inside = [member.name for member in fused.each_member()] if fused.kind == "outputs" else []
    names = [*inside, *BESIDE, "fused" if fused.fusion else fused.name]
    return [f"{name} ({number})" if names.count(name) > 1 else name
            for number, name in enumerate(names, 1)]


def pixels(image, model):
    """A PIL picture as float [1, 3, H, W] on [0, 1], as the model's loader hands it in."""
    return fit_picture(image, model.image_size)[None].float() / 255


@torch.inference_mode()
def answers(image):
    """{column: {class: probability}} of a PIL picture."""
    fused, *beside = models()
    images = pixels(image, fused)
    members = fused.each_member() if fused.kind == "outputs" else []
    told = [(member, member(images)) for member in members]
    told += [(model, model(pixels(image, model))) for model in beside]
    told.append((fused, fused(images)))
    # Logits, or log-probabilities of an output fusion: softmax makes probabilities of both.
    return {name: dict(zip(model.classes, logits[0].float().softmax(0).tolist()))
            for name, (model, logits) in zip(columns(), told)}


def page():
    import gradio as gr

    def show(image):
        if image is None:
            return [None for _ in columns()]
        try:
            return list(answers(image).values())
        except zoo.ZooError as error:
            raise gr.Error(str(error)) from None

    with gr.Blocks(title=@title@) as blocks:
        gr.Markdown(@heading@)
        image = gr.Image(type="pil", label="picture", height=320)
        with gr.Row():
            labels = [gr.Label(label=name, num_top_classes=5) for name in columns()]
        image.change(show, image, labels, api_name="answers")
    return blocks


if __name__ == "__main__":
    page().launch()
'''


def app_text(repository: str, address: str, beside: Mapping[str, str]) -> str:
    """repository: as people call it. address: what `zoo.load` takes. beside: name → address."""
    heading = (f"# {repository}\n\nDrop a picture: each column says which classes it sees in it, "
               "and how sure it is.")
    values = {"model": address, "beside": dict(beside), "title": repository, "heading": heading}
    text = _TEXT
    for name, value in values.items():
        text = text.replace(f"@{name}@", repr(value))
    return text
