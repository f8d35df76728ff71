"""The conformance kit: the core passes it, and a plugin with faults is told each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.errors import OptionError, UnknownName
from zoo.testing import Check, checks, parametrize_with_checks, run_checks

Install = Callable[..., Path]

GOOD = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="first", build="zoo_acme:first", kind="weights", summary="first",
                           idempotent=True)]

def first(tensors, *, key):
    return tensors[0].clone()
'''


@parametrize_with_checks("zoo")
def test_the_core_keeps_its_own_rules(check: Check) -> None:
    check()


def failures(namespace: str = "acme") -> dict[str, str]:
    return {outcome.check.name: outcome.reason for outcome in run_checks(namespace)
            if outcome.state == "failed"}


def test_a_right_plugin_passes(install: Install) -> None:
    install("acme", GOOD)
    assert failures() == {}


@pytest.mark.parametrize(("old", "new", "check", "reason"), [
    ("import zoo\n", "import zoo\nimport torch\n", "loads_alone_and_is_light",
     "loading acme imports torch; move that import into the module that `build` names"),
    ("tensors[0].clone()", "tensors[0].zero_()", "inputs_stay_as_they_are",
     "acme/first changed its input tensor"),
    ("tensors[0].clone()", "tensors[0] + __import__('torch').rand(())",
     "same_seed_gives_same_bytes", "draw random numbers from the seed, the key and the offset"),
    ("tensors[0].clone()", "tensors[0] * 2", "copies_of_a_model_give_it_back",
     "say idempotent=False in the spec"),
    ("idempotent=True", "symmetric=True", "order_does_not_matter",
     "say symmetric=False in the spec"),
    ("*, key", "*, key, **options", "options_are_keyword_only",
     "takes **options; name every option"),
    ("*, key", "*, key, power: float = float('inf')", "options_are_json",
     "the default of 'power' in zoo_acme:first is inf; let it be a JSON value"),
    ("*, key", "*, key, power: float = 1.0", "options_are_documented",
     "add a line 'power: …' under 'Options:'"),
    ("*, key", "*, key, power=1.0", "options_are_documented", "has no type: annotate it"),
    ('summary="first"', 'summary=""', "is_described", "acme/first has no summary"),
    ("zoo_acme:first", "zoo_acme:GROUP", "builder_resolves", "zoo_acme:GROUP"),
])
def test_a_fault_is_found_and_named(
    install: Install, old: str, new: str, check: str, reason: str
) -> None:
    assert old in GOOD
    install("acme", GOOD.replace(old, new))
    assert reason in failures()[check]


NETWORKS = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(
        name="surest", build="zoo_acme:surest", kind="weights", scope="model", summary="surest",
        uses={"module", "data", "labels", "score"}, can_use={"base"}, idempotent=True)]

def surest(states, *, weights, module, data, labels, score, base):
    """The member that the score, the network's and the labels' likelihood together like best."""
    from torch.func import functional_call
    from torch.nn.functional import cross_entropy

    def worth(state):
        pairs = zip(data, labels, strict=True)
        return score(state) - sum(
            float(cross_entropy(functional_call(module, state, (batch,)), truth))
            for batch, truth in pairs)

    return dict(max(states, key=worth))
'''


def test_a_fusion_that_asks_for_more_than_tensors_gets_it(install: Install) -> None:
    install("acme", NETWORKS)
    assert failures() == {}


@pytest.mark.parametrize(("old", "new", "check"), [
    ("    def worth", "    states[0]['conv.weight'].zero_()\n    def worth",
     "inputs_stay_as_they_are"),
    ("dict(max(states, key=worth))", "{k: v + __import__('torch').rand(v.shape) for k, v in "
     "states[0].items()}", "same_seed_gives_same_bytes"),
    ("dict(max(states, key=worth))", "{k: v * 2 for k, v in states[0].items()}",
     "copies_of_a_model_give_it_back"),
])
def test_and_its_faults_are_found(install: Install, old: str, new: str, check: str) -> None:
    assert old in NETWORKS
    install("acme", NETWORKS.replace(old, new))
    assert check in failures()


OUTPUTS = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="sum", build="zoo_acme:build", kind="outputs", summary="sum"),
            zoo.FusionSpec(name="cut", build="zoo_acme:cut", kind="features", summary="cut")]

def build(members, num_classes):
    import torch

    class Sum(torch.nn.Module):
        def forward(self, logits, features=None):
            return logits.sum(0)

    return Sum()

def cut(dims):
    import torch

    class Cut(torch.nn.Module):
        out_features = dims[0]

        def forward(self, features):
            return features[0]

    return Cut()
'''


def test_faults_of_modules_are_found(install: Install) -> None:
    install("acme", OUTPUTS)
    found = failures()
    assert "do not add up to one; return log-probabilities" in (
        found["answers_are_log_probabilities"])
    assert "no gradient reaches the features of member 2" in found["gradients_reach_everything"]


def test_an_expected_failure_needs_a_check_and_must_fail(install: Install) -> None:
    install("acme", GOOD.replace("tensors[0].clone()", "tensors[0] * 2"))
    outcomes = list(run_checks("acme", {"copies_of_a_model_give_it_back": "it doubles"}))
    assert [o.reason for o in outcomes if o.state == "expected"] == ["it doubles"]
    with pytest.raises(OptionError, match="did you mean 'is_described'"):
        parametrize_with_checks("acme", {"is_describd": "typo"})


def test_of_a_catalogue_only_what_is_named_is_checked() -> None:
    assert {check.subject for check in checks("timm")} == {"timm"}
    with pytest.raises(UnknownName, match="timm/resnet999"):
        checks("timm", ["resnet999"])


def test_zoo_check_says_what_to_change(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", GOOD.replace('summary="first"', 'summary=""'))
    with pytest.raises(SystemExit) as end:
        main(["check", "acme"])
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "acme/first: is_described: acme/first has no summary: say in one line" in printed
    assert "1 failed" in printed
