"""Fusions of features: what they compute, and that they run everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import OptionError
from zoo.fusion.features.aff import Aff
from zoo.fusion.features.attention import Attention
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


def features(name: str, batch: int = 4) -> list[Tensor]:
    """Vectors, tokens of different number or maps of one size."""
    generator = torch.Generator().manual_seed(1)
    takes = NAMED[name].takes
    counts = {"tokens": [(4,), (1,), (7,)]}.get(takes, [()] * 3)
    grid = (3, 2) if takes == "maps" else ()
    return [torch.randn(batch, *count, dim, *grid, generator=generator)
            for count, dim in zip(counts, DIMS, strict=True)]


@each
def test_output_has_the_promised_width_and_inputs_stay(name: str) -> None:
    module, given = built(name), features(name)
    before = [one.clone() for one in given]
    assert module(given).shape == (4, module.out_features)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
    assert module([one[:0] for one in given]).shape == (0, module.out_features)


@each
def test_every_parameter_and_every_member_gets_a_gradient(name: str) -> None:
    module, given = built(name), [one.requires_grad_() for one in features(name)]
    out = module(given)
    (out * torch.linspace(-1, 1, out.shape[1])).square().sum().backward()
    for tensor in (*module.parameters(), *given):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


@each
def test_same_result_compiled_saved_and_without_gradients(name: str) -> None:
    module, given = built(name), features(name)
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
    given = features("concat")
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
    module, given = built("gated", hidden=4), features("gated")
    w = module.gates.weight / sum(DIMS)**0.5
    gates = (w @ torch.cat(given, 1).T).T.view(4, 3, 4).softmax(1)
    expected = sum(gates[:, i] * torch.tanh(given[i] @ module.values[i].weight.T)
                   for i in range(3))
    torch.testing.assert_close(module(given), expected)
    assert module(given).abs().max() <= 1


def test_a_step_of_adam_moves_the_gates_by_little() -> None:
    """Of so many features, gates whose weights are small by themselves are shut after one step, and
    lose five points on real features at a rate of 1e-2."""
    torch.manual_seed(0)
    module, head = Gated([1000, 1000], hidden=16), nn.Linear(16, 4)
    given, labels = [torch.randn(4, 1000), torch.randn(4, 1000)], torch.arange(4)
    optimizer = torch.optim.Adam(module.gates.parameters(), lr=1e-2)

    def gates() -> torch.Tensor:
        return module.gates(torch.cat(given, 1)).detach().view(4, 2, 16).softmax(1)

    before = gates()
    nn.functional.cross_entropy(head(module(given)), labels).backward()
    optimizer.step()
    moved = float((gates() - before).abs().mean())
    assert 0.01 < moved < 0.1, moved


def test_attention_is_the_papers_pooling() -> None:
    """PMA with one head, written out."""
    module, given = built("attention", hidden=6, heads=1, queries=2), features("attention")
    z = torch.cat([project(one) for project, one
                   in zip(module.projections, given, strict=True)], 1)  # (B, 12, 6)
    wq, wk, wv, wo, wf = (layer.weight / 6**0.5 for layer in (
        module.query, module.key, module.value, module.out, module.feed_forward[0]))
    s = module.queries
    weights = ((s @ wq.T) @ (z @ wk.T).mT / 6**0.5).softmax(2)  # (B, 2, 12)
    attended = weights @ (z @ wv.T) @ wo.T
    h = nn.functional.layer_norm(s + attended, (6,))
    expected = nn.functional.layer_norm(h + (h @ wf.T).relu(), (6,))
    torch.testing.assert_close(module(given), expected.flatten(1))


def test_a_step_of_adam_moves_attention_by_little_behind_its_projections() -> None:
    """By its rate, and not by its rate over weights that are small: those move four times as far
    here, and lose ten points on real features at a rate of 1e-2."""
    torch.manual_seed(0)
    module, head = Attention([64]), nn.Linear(256, 4)
    module.projections.requires_grad_(False)
    tokens, labels = torch.randn(64, 8, 64), torch.arange(64) % 4
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    before = module([tokens]).detach()
    nn.functional.cross_entropy(head(module([tokens])), labels).backward()
    optimizer.step()
    moved = float((module([tokens]).detach() - before).norm() / before.norm())
    assert 0.01 < moved < 0.4, moved


def test_the_order_of_a_members_tokens_does_not_matter() -> None:
    module, given = built("attention"), features("attention")
    torch.testing.assert_close(module(given), module([one.flip(1) for one in given]))


def test_aff_is_the_papers_weighted_sum() -> None:
    module, given = built("aff", hidden=8), features("aff")
    x, y, third = (project(one) for project, one in zip(module.projections, given, strict=True))
    for attention, other in zip(module.attentions, (y, third), strict=True):
        both = x + other
        context = attention.local_context(both) + attention.global_context(both)
        assert attention.global_context(both).shape[2:] == (1, 1)
        m = torch.sigmoid(context)
        x = m * x + (1 - m) * other
    torch.testing.assert_close(module(given), x.mean((2, 3)))
    twice = [given[0]] * 2  # what is fused with itself stays
    same = Aff([3, 3], hidden=8).eval()
    same.projections[1].load_state_dict(same.projections[0].state_dict())
    torch.testing.assert_close(same(twice), same.projections[0](given[0]).mean((2, 3)))


def test_wrong_options_say_what_is_right() -> None:
    with pytest.raises(OptionError, match=r"concat: dropout is 1.0, expected a probability in \[0"):
        Concat(DIMS, dropout=1.0)
    with pytest.raises(OptionError, match=r"gated: hidden is 0, expected a positive number"):
        Gated(DIMS, hidden=0)
    with pytest.raises(OptionError, match=r"attention: hidden is 10, heads 4 and queries 1, "):
        Attention(DIMS, hidden=10)
    with pytest.raises(OptionError, match=r"aff: hidden is 8 and reduction 9, expected positive"):
        Aff(DIMS, hidden=8, reduction=9)


def test_only_the_k_best_experts_speak() -> None:
    module, given = built("moe", k=1, hidden=4), features("moe")
    normed = [norm(one) for norm, one in zip(module.norms, given, strict=True)]
    best = module.gate(torch.cat(normed, 1)).argmax(1)
    expected = torch.stack([module.experts[expert](normed[expert])[row]
                            for row, expert in enumerate(best.tolist())])
    torch.testing.assert_close(module(given), expected)
    with pytest.raises(OptionError, match=r"moe: k is 4, expected 1 to 3, the experts of all"):
        built("moe", k=4)


def test_bilinear_features_have_one_length() -> None:
    out = built("bilinear", hidden=16)(features("bilinear"))
    torch.testing.assert_close(out.norm(dim=1), torch.full((4,), 4.0))
