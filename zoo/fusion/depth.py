"""How deep in the network each tensor lies, read from its key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

# Modules that hold a row of layers; a number in or after one of these names counts the layers.
_ROWS = frozenset({"block", "blocks", "layer", "layers", "stage", "stages", "features", "h",
                   "resblocks", "denseblock", "denselayer", "transition", "mixed", "s", "b"})
# What comes after the last layer.
_AFTER = frozenset({"head", "head_dist", "fc", "classifier", "last_linear", "conv_head", "bn2",
                    "norm", "norm5", "fc_norm", "ln_f", "ln_post", "lm_head", "pre_logits",
                    "attn_pool", "final_conv", "auxlogits", "norm_f", "final_layer_norm",
                    "final_layernorm", "embed_out", "output", "output_layer", "score", "pooler"})
_BEFORE = ("stem", "patch_embed", "embed")
_NUMBERED = re.compile(r"(.*?)_?(\d+)[a-z]?")


def depths(keys: Iterable[str]) -> dict[str, float]:
    """The depth of each tensor's layer: 0 in the first block and before it, 1 in the last and after
    it, evenly spaced between; 0.5 where the names tell nothing.

    >>> depths(["conv1.weight", "layer1.0.w", "layer1.1.w", "layer2.0.w", "fc.bias"])
    {'conv1.weight': 0.0, 'layer1.0.w': 0.0, 'layer1.1.w': 0.5, 'layer2.0.w': 1.0, 'fc.bias': 1.0}
    """
    layer_of = {key: _layer(key) for key in keys}
    layers = sorted({layer for layer in layer_of.values() if layer})
    if not layers:
        return dict.fromkeys(layer_of, 0.5)
    last = len(layers) - 1
    depth_of = {layer: place / last if last else 0.5 for place, layer in enumerate(layers)}
    return {key: depth_of[layer] if layer else float(is_after(key))
            for key, layer in layer_of.items()}


def blocks(keys: Iterable[str]) -> tuple[dict[str, int], int]:
    """The number of each tensor's block, from 0, and how many blocks there are. What comes before
    the first is in it; what comes after the last has a number of its own.

    >>> blocks(["conv1.weight", "layer1.0.w", "layer1.1.w", "layer2.0.w", "fc.bias"])
    ({'conv1.weight': 0, 'layer1.0.w': 0, 'layer1.1.w': 1, 'layer2.0.w': 2, 'fc.bias': 3}, 3)
    """
    keys = list(keys)
    number_of = layers(keys)
    count = max(number_of.values(), default=-1) + 1
    return {key: number_of.get(key, count if is_after(key) else 0) for key in keys}, count


def layers(keys: Iterable[str]) -> dict[str, int]:
    """The number of each tensor's layer, from 0; those that are in none are left out."""
    layer_of = {key: _layer(key) for key in keys}
    place = {layer: number for number, layer
             in enumerate(sorted({layer for layer in layer_of.values() if layer}))}
    return {key: place[layer] for key, layer in layer_of.items() if layer}


@lru_cache(1 << 16)
def _layer(key: str) -> tuple[tuple[int, str], ...]:
    """What a layer's tensors share, in sorting order: the parts of the key up to its last row of
    layers, `layer1.0` of `layer1.0.downsample.0.weight`; () outside of all rows."""
    parts = key.split(".")[:-1]
    cut = 0
    for place, part in enumerate(parts):
        in_row = cut == place or parts[place - 1].lower() in _ROWS
        numbered = _NUMBERED.fullmatch(part.lower())
        if (part.isdecimal() and in_row) or (numbered and numbered[1] in _ROWS):
            cut = place + 1
    return tuple((_number(part), part) for part in parts[:cut])


def _number(part: str) -> int:
    found = re.search(r"\d+", part)
    return int(found[0]) if found else -1


def is_after(key: str) -> bool:
    """Whether a tensor outside of all layers comes after them."""
    parts = key.lower().split(".")[:2]
    return parts[0] in _AFTER or (not parts[0].startswith(_BEFORE)
                                  and any(part in _AFTER for part in parts))
