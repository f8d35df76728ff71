"""The model card: `README.md` of a saved model, which is the front page of a Hub repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from zoo.model import Model


def model_card(model: Model, described: Mapping[str, Any], *, plain: bool) -> str:
    """What the model is, where it comes from and how to use it.

    described: what stands under `zoo` in config.json. plain: whether timm alone can load it.
    """
    made = described["made_with"]
    front = {
        "library_name": "timm" if plain else "fusion-zoo",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *(["merge"] if model.fusion else []), "fusion-zoo"],
    }
    sources = [source for source in made["sources"] if source.get("repository")]
    if sources:
        front["base_model"] = sorted({source["repository"] for source in sources})
        front["base_model_relation"] = "merge" if model.fusion else "finetune"
    if len(made["licences"]) == 1:
        front["license"] = made["licences"][0]
    how = f"fused by `{model.fusion}`" if model.fusion else f"one network, `{model.name}`"
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
        f"# {model.name}", "",
        f"An image classifier for {len(model.classes)} classes, {how}.", "",
        "| member | classes | features | batch norm |", "| --- | --- | --- | --- |",
        *(f"| {member.name} | {len(member.classes) or '–'} | {member.dim} | {member.norms} |"
          for member in model.each_member()),
        "", "## Use", "", "```python", "import zoo", "",
        'model = zoo.load("path/to/this/folder")  # or "hf-hub:org/name"',
        "logits = model(images)  # float [B, 3, H, W] on [0, 1]; resizes and normalises inside",
        "```",
    ]
    if plain:
        lines += ["", "It is a plain timm model too:", "", "```python", "import timm", "",
                  'net = timm.create_model("local-dir:path/to/this/folder", pretrained=True)',
                  "```"]
    lines += ["", "## Made with", "", "```json", json.dumps(made, indent=2), "```"]
    return "\n".join(lines) + "\n"
