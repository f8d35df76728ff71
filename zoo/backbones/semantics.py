"""timm's semantics, made even: pooled features, tokens, maps, the classifier, and which tensors are
its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ZooError


def pooled_features(net: nn.Module, x: Tensor) -> Tensor:
    """Features [B, D] of a prepared batch [B, C, H, W], as the classifier gets them."""
    return _pooled(net, unpooled(net, x))


def tokens(net: nn.Module, x: Tensor) -> Tensor:
    """Tokens [B, N, D] of a prepared batch [B, C, H, W], as they are before pooling: class and
    other prefix tokens first, then the patches; a convolutional network's positions row by row. Of
    a network that gives neither one sequence nor one grid, the pooled features as the one token."""
    features = unpooled(net, x)
    if isinstance(features, Tensor) and features.ndim in (3, 4):
        return as_tokens(net, features)
    return _pooled(net, features)[:, None]


def as_tokens(net: nn.Module, features: Any) -> Tensor:
    """A sequence [B, N, D], a grid, or one vector [B, D], as tokens [B, N, D]. Raises ZooError for
    anything else."""
    if not isinstance(features, Tensor) or not 2 <= features.ndim <= 4:
        raise ZooError(f"it gives {_what(features)} there, expected a vector, tokens or maps")
    if features.ndim == 2:
        return features[:, None]
    return features if features.ndim == 3 else (
        _channels_first(net, features).flatten(2).transpose(1, 2))  # (B, H W, D)


def maps(net: nn.Module, x: Tensor) -> Tensor:
    """Maps [B, D, h, w] of a prepared batch [B, C, H, W], as they are before pooling. Those of a
    transformer are its patch tokens on their grid.

    Raises ZooError for a network that has no one grid.
    """
    return as_maps(net, x, unpooled(net, x))


def as_maps(net: nn.Module, x: Tensor, features: Any) -> Tensor:
    """A grid or a sequence [B, N, D] that the network made of x [B, C, H, W], as maps
    [B, D, h, w]. Raises ZooError for anything else."""
    if isinstance(features, Tensor) and features.ndim == 4:
        return _channels_first(net, features)
    if not isinstance(features, Tensor) or features.ndim != 3:
        raise ZooError(f"its features before pooling are {_what(features)}")
    count = features.shape[1]
    declared = getattr(net, "num_prefix_tokens", None)
    # Networks that say nothing of their prefix have none, or a class token.
    for prefix in (0, 1) if declared is None else (declared,):
        grid = _grid(net, count - prefix, (x.shape[-2], x.shape[-1]))
        if grid:
            patches = features[:, prefix:].transpose(1, 2)  # (B, D, h w)
            return patches.reshape(*patches.shape[:2], *grid)
    raise ZooError(f"its tokens [B, {count}, {features.shape[2]}] are no grid of an image of "
                   f"{x.shape[-2]} × {x.shape[-1]} pixels")


def on_one_grid(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps [B, Dᵢ, hᵢ, wᵢ] at the finest height and width among them, resampled bilinearly.

    On that grid none loses detail: all are only ever enlarged, so that there is nothing to alias.
    """
    finest = [max(one.shape[axis] for one in maps) for axis in (2, 3)]
    return [one if list(one.shape[2:]) == finest
            else functional.interpolate(one, finest, mode="bilinear") for one in maps]


def classify(net: nn.Module, features: Tensor) -> Tensor:
    """The classifier's logits [B, classes] of pooled features [B, D]."""
    head = cast(Any, net).get_classifier()
    if isinstance(head, nn.Conv2d):  # 1 × 1, in timm's ResNetV2, DPN and DLA
        features = features[:, :, None, None]  # (B, D, 1, 1)
    return cast(Tensor, head(features)).flatten(1)


def same_answer(net: nn.Module, features: Tensor, logits: object) -> bool:
    """Whether `classify` of these features gives these logits: of a few networks it does not."""
    try:
        answer = classify(net, features)
    except (RuntimeError, TypeError, IndexError):
        return False
    return (isinstance(logits, Tensor) and answer.shape == logits.shape
            and torch.allclose(answer, logits, rtol=1e-4, atol=1e-4))


def classifier_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The parameters of the classifier, or of both of a distilled network's."""
    return [parameter for head in _classifiers(net) for parameter in head.parameters()]


def classifier_keys(net: nn.Module) -> tuple[str, ...]:
    """The keys of the classifier's tensors in the state."""
    own = {id(tensor) for head in _classifiers(net)
           for tensor in (*head.parameters(), *head.buffers())}
    named = (*net.named_parameters(remove_duplicate=False),
             *net.named_buffers(remove_duplicate=False))
    return tuple(key for key, tensor in named if id(tensor) in own)


def unpooled(net: nn.Module, x: Tensor) -> Any:
    """The features of a prepared batch before pooling: a tensor, or in a few networks a list."""
    return cast(Any, net).forward_features(x)


def _what(features: Any) -> str:
    if not isinstance(features, Tensor):
        return "several tensors"
    return f"[B, {', '.join(map(str, features.shape[1:]))}]"


def _pooled(net: nn.Module, features: Any) -> Tensor:
    pooled = cast(Any, net).forward_head(features, pre_logits=True)
    if isinstance(pooled, (tuple, list)):  # distilled networks: one per token
        pooled = torch.stack(list(pooled)).mean(0)
    return cast(Tensor, pooled).flatten(1)


def _channels_first(net: nn.Module, features: Tensor) -> Tensor:
    """A grid with its channels in front. A network whose channels are last says so, as timm's do,
    or of the widths that it names one fits that axis alone, or none any and the rest is square."""
    layout = getattr(net, "output_fmt", None)
    widths = _widths(net)
    first, middle, end = features.shape[1:]
    if layout:
        last = layout == "NHWC"
    elif end in widths:
        last = first not in widths and not first != middle == end  # 16 maps of 32 × 32
    else:
        last = bool(widths) and first not in widths and first == middle != end
    return features.permute(0, 3, 1, 2) if last else features


def _widths(net: nn.Module) -> set[int]:
    """The numbers of channels that a network says it has, at its end and at its depths."""
    told: Any = getattr(net, "feature_info", None)
    infos = getattr(told, "info", told)
    named = [info.get("num_chs") for info in infos if isinstance(info, dict)] \
        if isinstance(infos, (list, tuple)) else []
    return {int(width) for width in (getattr(net, "num_features", None), *named) if width}


def _grid(net: nn.Module, count: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of this many patches: those that the network names, or the ones in the
    proportions of the image (height, width)."""
    if count < 1:
        return None
    embed: Any = getattr(net, "patch_embed", None)
    named = (embed.dynamic_feat_size(image) if hasattr(embed, "dynamic_feat_size")
             else getattr(embed, "grid_size", None))
    if named and math.prod(named) == count:
        return tuple(named)
    height, width = image
    rows, columns = (round(math.sqrt(count * one / other))
                     for one, other in ((height, width), (width, height)))
    return (rows, columns) if rows * columns == count else None


def _classifiers(net: nn.Module) -> list[nn.Module]:
    found = cast(Any, net).get_classifier()
    return list(found) if isinstance(found, (tuple, list)) else [found]
