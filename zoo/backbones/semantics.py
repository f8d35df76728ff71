"""timm's semantics, made even: pooled features, the classifier, and which tensors are its own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def pooled_features(net: nn.Module, x: Tensor) -> Tensor:
    """Features [B, D] of a prepared batch [B, C, H, W], as the classifier gets them."""
    features = cast(Any, net).forward_head(cast(Any, net).forward_features(x), pre_logits=True)
    if isinstance(features, (tuple, list)):  # distilled networks: one per token
        features = torch.stack(list(features)).mean(0)
    return cast(Tensor, features).flatten(1)


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


def _classifiers(net: nn.Module) -> list[nn.Module]:
    found = cast(Any, net).get_classifier()
    return list(found) if isinstance(found, (tuple, list)) else [found]
