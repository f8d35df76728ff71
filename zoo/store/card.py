"""The model card: `README.md` of a saved model, which is the front page of a Hub repository."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from zoo.model import Model
from zoo.store.licences import terms


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
    licence, _ = terms(made)
    if licence:
        front["license"] = licence
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


def published(card: str, repository: str, licence: str | None) -> str:
    """The card as it stands on the Hub: it says how to use the model from there.

    licence: put in place of what the card says; None leaves that alone.
    """
    for here, there in _ADDRESSES.items():
        card = card.replace(here, there.format(repository))
    if licence is None:
        return card
    match = re.match(r"---\r?\n(.*?)\n---", card, re.DOTALL)
    front = (yaml.safe_load(match[1]) if match else None) or {}
    told = yaml.safe_dump({**front, "license": licence}, sort_keys=False).strip()
    return f"---\n{told}\n---" + (card[match.end():] if match else f"\n\n{card}")


# What `model_card` writes of a folder, and what it becomes.
_ADDRESSES = {
    '"path/to/this/folder")  # or "hf-hub:org/name"': '"hf-hub:{}")',
    '"local-dir:path/to/this/folder"': '"hf-hub:{}"',
}
