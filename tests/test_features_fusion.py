"""Fusions of features: what they compute, and that they run everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import OptionError
from zoo.fusion.features.concat import Concat
from zoo.fusion.features.gated import Gated
from zoo.fusion.specs import SPECS
from zoo.registry import load

DIMS = [3, 5, 2]
NAMES = [spec.name for spec in SPECS if spec.kind == "features"]
NAMED = {spec.name: spec for spec in SPECS}
each = pytest.mark.parametrize("name", NAMES)


def built(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return load(NAMED[name])(DIMS, **options).eval()


def features(batch: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, dim, generator=generator) for dim in DIMS]


@each
def test_output_has_the_promised_width_and_inputs_stay(name: str) -> None:
    module, given = built(name), features()
    before = [one.clone() for one in given]
    assert module(given).shape == (4, module.out_features)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
    assert module([one[:0] for one in given]).shape == (0, module.out_features)


@each
def test_every_parameter_and_every_member_gets_a_gradient(name: str) -> None:
    module, given = built(name), [one.requires_grad_() for one in features()]
    module(given).square().sum().backward()
    for tensor in (*module.parameters(), *given):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


@each
def test_same_result_compiled_saved_and_without_gradients(name: str) -> None:
    module, given = built(name), features()
    expected = module(given)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(given), expected)
    with torch.inference_mode():
        torch.testing.assert_close(module(given), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(given).float(), expected, atol=0.05, rtol=0.05)
    twin = load(NAMED[name])(DIMS)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin.eval()(given), expected)


def test_concat_normalises_each_member() -> None:
    given = features()
    joined = built("concat")([given[0], given[1] * 1000, given[2]])
    for part in joined.split(DIMS, 1):
        torch.testing.assert_close(part.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.var(1, correction=0), torch.ones(4), atol=1e-2, rtol=0)
    plain = built("concat", norm=False)
    assert torch.equal(plain(given), torch.cat(given, 1))
    assert not list(plain.parameters())


def test_concat_drops_features_in_training_only() -> None:
    module = Concat(DIMS, norm=False, dropout=0.5)
    ones = [torch.ones(1000, dim) for dim in DIMS]
    torch.manual_seed(0)
    assert 0.45 < (module(ones) == 0).float().mean() < 0.55
    assert (module.eval()(ones) == 1).all()


def test_gated_is_the_papers_sum() -> None:
    module, given = built("gated", hidden=4), features()
    gates = (module.gate.weight @ torch.cat(given, 1).T).T.view(4, 3, 4).softmax(1)
    expected = sum(gates[:, i] * torch.tanh(given[i] @ module.values[i].weight.T)
                   for i in range(3))
    torch.testing.assert_close(module(given), expected)
    assert module(given).abs().max() <= 1


def test_wrong_options_say_what_is_right() -> None:
    with pytest.raises(OptionError, match=r"concat: dropout is 1.0, expected a probability in \[0"):
        Concat(DIMS, dropout=1.0)
    with pytest.raises(OptionError, match=r"gated: hidden is 0, expected a positive number"):
        Gated(DIMS, hidden=0)
