"""Every check of the conformance kit finds its fault in a plugin, and says what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_plugins import (
    BACKBONE,
    CATALOG,
    DATA,
    FEATURES,
    FITTED,
    MEASURED,
    OUTPUTS,
    SCORED,
    SLICE,
    STATES,
    TRANSFER,
    WEIGHTS,
)

from zoo.testing import (
    backbones,
    checks,
    datasets,
    fusions,
    plugins,
    run_checks,
    transfers,
    weights,
)

Install = Callable[..., Path]

RANDOM = "__import__('torch').rand(())"

FAULTS = [
    (WEIGHTS, "import zoo\n", "import zoo\nimport torch\n", "loads_alone_and_is_light",
     "loading acme imports torch; move that import into the module that `build` names"),
    (WEIGHTS, "    return [zoo.Fusion", "    return []\n    [zoo.Fusion", "brings_something",
     "acme brings nothing: return specs from one of its hooks"),
    (CATALOG, '"one": "one", ', "", "catalogue_finds_what_it_lists",
     "lists 'one' and does not find it; let find give a spec for every name of search('*')"),
    (CATALOG, "if name in known else None", "", "catalogue_finds_what_it_lists",
     "finds 'no.such-name'; let find give None for what it has not"),
    (CATALOG, 'return fnmatch', 'return ["acme/one"] or fnmatch', "catalogue_finds_what_it_lists",
     "lists 'acme/one'; give names without the namespace"),
    (WEIGHTS, "zoo_acme:first", "zoo_acme:SEEN", "builder_resolves",
     "zoo_acme:SEEN is a list; let it be a function or a class"),
    (WEIGHTS, "idempotent", 'measure="zoo_acme:gone", idempotent', "builder_resolves",
     "acme/first is built by 'zoo_acme:gone': AttributeError"),
    (WEIGHTS, "*, key", "*, key, **options", "options_are_keyword_only",
     "takes **options; name every option"),
    (WEIGHTS, "*, key", "key, *, power=1", "options_are_keyword_only",
     "the argument 'key' of zoo_acme:first can be given by position; put a '*' before it"),
    (WEIGHTS, "*, key", "*, key, norms: str = 'kept'", "options_can_be_given",
     "the option 'norms' of acme/first can never be given: zoo.fuse has an argument of that name"),
    (WEIGHTS, "*, key", "*, key, power: float = float('inf')", "options_are_json",
     "the default of 'power' in zoo_acme:first is inf; let it be a JSON value"),
    (WEIGHTS, "*, key", "*, key, power: int = 0.5", "options_are_json",
     "a default of zoo_acme:first is refused by its own type: acme/first: the option 'power' is "
     "0.5"),
    (WEIGHTS, "*, key", "*, key, power: int", "options_have_defaults",
     "the option 'power' of acme/first must be given; give it a default"),
    (WEIGHTS, "*, key", "*, key, power: float = 1.0", "options_are_documented",
     "add a line 'power: …' under 'Options:'"),
    (WEIGHTS, "*, key", "*, key, power=1.0", "options_are_documented", "has no type: annotate it"),
    (WEIGHTS, 'summary="first"', 'summary=""', "is_described",
     "acme/first has no summary: say in one line what it does"),

    (WEIGHTS, "tensors[0].clone()", "tensors[0].zero_()", "inputs_stay_as_they_are",
     "acme/first changed its input tensor"),
    (WEIGHTS, "tensors[0].clone()", "tensors[0][None]", "keys_shapes_and_dtypes_are_kept",
     "'scale' became [1], from []. This is a defect of the strategy"),
    (STATES, "return states[-1]", "return {'conv.weight': states[-1]['conv.weight']}",
     "keys_shapes_and_dtypes_are_kept", "became missing"),
    (STATES, "    return states", "    states[0]['bn.num_batches_tracked'].zero_(); return states",
     "integer_buffers_are_copied", "changed an integer buffer; with scope='model' copy what is"),
    (WEIGHTS, "tensors[0].clone()", f"tensors[0] + {RANDOM}", "same_seed_gives_same_bytes",
     "draw random numbers from the seed, the key and the offset"),
    (WEIGHTS, "tensors[0].clone()", "tensors[0] * 2", "copies_of_a_model_give_it_back",
     "say idempotent=False in the spec"),
    (WEIGHTS, "idempotent", "symmetric", "order_does_not_matter",
     "say symmetric=False in the spec"),
    (WEIGHTS, "return tensors[0]", "SEEN.append(key); return tensors[len(SEEN) % 2]",
     "order_of_tensors_does_not_matter", "keep nothing between two calls"),
    (SLICE, "tensors[0].clone()", "tensors[0] - tensors[0].mean()", "cuts_do_not_matter",
     "leave what is needed of the whole tensor or model to `measure`"),
    (MEASURED, ".square().sum()", ".abs().max()", "cuts_do_not_matter",
     "another cut of the tensors gave another result"),
    (WEIGHTS, "tensors[0].clone()", f"tensors[0] * {RANDOM}", "every_device_of_the_machine_works",
     "the result on cpu is not the CPU's"),
    (WEIGHTS, "tensors[0].clone()", "tensors[0] / 0", "fused_models_save_and_load",
     "'conv1.weight' has values beyond the range of torch.float32"),
    (WEIGHTS, "*, key):", "*, key, power: float = 1.0):\n    1 / power",
     "errors_name_option_and_value", "acme/first with power=0.0 raises ZeroDivisionError: float "
     "division by zero; check the option first: raise OptionError('acme/first', 'power is 0.0, "
     "expected …')"),

    (FEATURES, "self.out_features = width", "self.out_features = 9",
     "output_has_the_promised_shape",
     "acme/sum gave [1, 4] for a batch of 1, expected [1, out_features = 9]"),
    (FEATURES, "self.out_features = width", "pass", "output_has_the_promised_shape",
     "does not say its size; set self.out_features to D of its output [B, D]"),
    (FEATURES, "return sum(one(part)", "return sum(one(part.detach())",
     "gradients_reach_everything", "no gradient reaches the features of member 1 of acme/sum"),
    (FEATURES, "self.out_features", "self.idle = torch.nn.Linear(1, 1); self.out_features",
     "gradients_reach_everything", "no gradient reaches the parameter 'idle.weight'"),
    (FEATURES, "return sum(one(part)", "return sum(one(part - part.mean(0))", "images_do_not_mix",
     "acme/sum answers differently for an image alone and among others"),
    (FEATURES, "self.out_features", "torch.seed(); self.out_features",
     "same_seed_builds_the_same_fuser", "draw from torch's generator, which zoo.fuse seeds"),
    (FEATURES, "return sum(one(part)", "return sum(one(part.mul_(2))", "inputs_stay_as_they_are",
     "acme/sum changed what member 1 gave; work without in-place operations"),
    (FEATURES, "return sum(one(part)", "return torch.rand(()) + sum(one(part)",
     "every_device_of_the_machine_works", "acme/sum answers differently on cpu"),
    (FEATURES, "return sum(one(part)", "print(features); return sum(one(part)",
     "compiles_and_autocasts", "acme/sum does not compile to one graph"),
    (FEATURES.replace("return sum", "return self.shift + sum"), "for dim in dims])",
     "for dim in dims]); self.shift = torch.rand(())",
     "fused_models_save_and_load", "keep all that it has learnt in parameters and buffers"),
    (FEATURES, "width is {width}, expected 1 or more", "too small", "errors_name_option_and_value",
     "acme/sum refuses width=-1 with 'too small'; let the error name the option, what was given"),

    (OUTPUTS, ".log_softmax(1)", "", "answers_are_log_probabilities",
     "do not add up to one; return log-probabilities"),
    (OUTPUTS, ".log_softmax(1)", ".softmax(1).log() / 0", "answers_are_log_probabilities",
     "not finite for logits of ±1; the NLL must stay finite"),
    (FITTED, "pass", "pass", "refuses_to_answer_unfitted",
     "raise zoo's NotFitted from forward until it is fitted"),
    (OUTPUTS, "logits.mean(0)", "logits[0]", "outputs_order_does_not_matter",
     "for another order of the members; say symmetric=False"),
    (OUTPUTS, "logits.mean(0)", "logits.sum(0)", "outputs_of_copies_are_the_members",
     "copies of one member do not answer like it in acme/mean; say idempotent=False"),
    (OUTPUTS, "logits.mean(0)", "logits.mul_(2).mean(0)", "inputs_stay_as_they_are",
     "acme/mean changed what member 1 gave"),
    (OUTPUTS, "            return", "            print()\n            return",
     "compiles_and_autocasts", "acme/mean does not compile to one graph"),
    (OUTPUTS, "            return logits", "            return torch.rand(()) * logits",
     "every_device_of_the_machine_works", "acme/mean answers differently on cpu"),
    (OUTPUTS, "            return logits", "            return torch.rand(()) * logits",
     "fused_models_save_and_load", "acme/mean answers differently after save and load"),
    (OUTPUTS, "    return Mean()", "    [1][0 if bend > 0 else 9]; return Mean()",
     "errors_name_option_and_value", "acme/mean with bend=-1.0 raises IndexError"),

    (BACKBONE, "def get_classifier", "def classifier", "has_timms_semantics",
     "Net has no get_classifier, which every backbone has, as in timm"),
    (BACKBONE, "num_features = 6", "num_feature = 6", "has_timms_semantics",
     "acme/net does not say self.num_features"),
    (BACKBONE, "feature_dim=6", "feature_dim=7", "has_timms_semantics",
     "acme/net has 6 features and its spec says 7"),
    (BACKBONE, "self.num_classes = num_classes", "num_classes = self.num_classes = 5",
     "gives_logits_of_the_asked_number", "acme/net gave [2, 5] for num_classes=4"),
    (BACKBONE, "self.fc = nn.Linear(6, num_classes)",
     "self.fc = getattr(self, 'fc', nn.Linear(6, num_classes))",
     "gives_logits_of_the_asked_number", "reset_classifier(3) of acme/net did not change"),
    (BACKBONE, "nn.Conv2d(in_chans", "nn.Conv2d(3", "takes_other_channels",
     "acme/net does not work with in_chans=1: Given groups=1, weight of size [6, 3, 3, 3]"),
    (BACKBONE, "    if pretrained:", "    if False:", "weights_are_real_or_refused",
     "builds with pretrained=True; raise zoo.errors.WeightsError"),
    (BACKBONE, "return self.one(x)", "return self.one(x).detach()",
     "gradients_reach_every_parameter", "no gradient reaches"),
    (BACKBONE, "return self.one(x)", "return self.one(x.relu_())", "images_stay_as_they_are",
     "acme/net changed its input; begin without an in-place operation"),
    (BACKBONE, "    net = Net()", "    torch.seed(); net = Net()",
     "same_seed_builds_the_same_network", "acme/net started"),
    (BACKBONE, "return self.one(x)", "return self.one(x) * torch.rand(())",
     "network_saves_and_loads", "acme/net answers differently after save and load on cpu"),
    (BACKBONE, "return self.one(x)", "print(); return self.one(x)",
     "network_compiles_and_autocasts", "acme/net does not compile to one graph"),

    (TRANSFER, "return self.criterion", "return 0 * self.criterion", "trains_and_says_so",
     "acme/plain changed nothing; let the parameters that train require gradients"),
    (TRANSFER, "return self.criterion", "return None and self.criterion",
     "gradients_reach_what_trains", "the loss of acme/plain is a NoneType; return a tensor of one"),
    (TRANSFER, "return self.criterion", "torch.seed(); return torch.rand(()) * self.criterion",
     "same_seed_trains_the_same", "draw random numbers from torch's generator, which the loop"),
    (TRANSFER, "batch.labels)\n", "batch.labels) * len(batch.labels)\n", "loss_is_a_mean",
     "return the mean over the batch"),
    (TRANSFER, "            super().__init__(model, criterion)",
     "            super().__init__(model, criterion); [t.each_member().__next__().net.fc2.bias.data"
     ".zero_() for t in teachers]", "teachers_stay_as_they_are",
     "acme/plain changed"),
    (TRANSFER, "super().__init__(model, criterion)",
     "super().__init__(model, criterion); self.idle = torch.nn.Linear(2, 2)",
     "gradients_reach_what_trains", "no gradient reaches 'idle.weight', which acme/plain lets "
     "train; use it in the loss, or freeze it in choose_trained()"),
    (TRANSFER, "return self.criterion(self.logits(batch), batch.labels)",
     "return self.criterion(torch.mm(self.logits(batch), torch.eye(4).double()), batch.labels)",
     "trains_in_bfloat16", "acme/plain does not train with precision='bfloat16'"),
    (TRANSFER, "return self.criterion", "raise RuntimeError('on cuda:0'); return self.criterion",
     "trains_on_every_device", "acme/plain does not train on cpu: on cuda:0; make tensors on the "
     "device of those that you are given"),
    (TRANSFER, "super().__init__(model, criterion)",
     "super().__init__(model, criterion); "
     "next(model.each_member()).net.act1 = torch.nn.GELU()", "trained_models_save_and_load",
     "a model trained by acme/plain answers differently after save and load; hang nothing on"),
    (TRANSFER, "    return Plain()", "    assert strength > 0; return Plain()",
     "errors_name_option_and_value", "acme/plain with strength=-1.0 raises AssertionError"),
    (TRANSFER, 'uses={"teachers"}', 'uses={"teachers"}, without_labels={"strength": 0.5}',
     "learns_without_labels", "acme/plain with strength=0.5 does not train on images without "
     "labels: IndexError: Target -1 is out of bounds.; leave batch.labels"),

    (DATA, "classes = [\"a\", \"b\"]", "classes = [\"a\", split]", "every_split_opens",
     "the splits of acme/dots have different classes"),
    (DATA, ", generator=generator)", ")", "opens_the_same_twice",
     "acme/dots gave other images the second time; fix its order"),
    (DATA, '"test": 1', '"test": 0', "splits_do_not_overlap",
     "8 of 8 images of the last split of acme/dots are in the first"),
]


@pytest.mark.parametrize(("plugin", "old", "new", "name", "reason"), FAULTS,
                         ids=lambda value: None)
def test_a_fault_is_found_and_named(
    install: Install, plugin: str, old: str, new: str, name: str, reason: str
) -> None:
    assert old in plugin
    install("acme", plugin.replace(old, new, 1))
    check = next(check for check in checks("acme") if check.name == name)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # two random numbers may be alike
        with pytest.raises(Exception) as caught:
            check()
    assert reason in str(caught.value)


def test_a_distribution_without_a_version_is_no_requirement(install: Install) -> None:
    install("acme", WEIGHTS, version="")
    check = next(check for check in checks("acme") if check.name == "has_a_distribution")
    with pytest.raises(AssertionError, match="has no version: give it one in"):
        check()


@pytest.mark.parametrize("plugin", [WEIGHTS, SLICE, MEASURED, STATES, SCORED, FEATURES, OUTPUTS,
                                    BACKBONE, TRANSFER, DATA, CATALOG])
def test_without_the_fault_the_plugin_passes(install: Install, plugin: str) -> None:
    install("acme", plugin)
    assert {o.check.name: o.reason for o in run_checks("acme") if o.state == "failed"} == {}


def test_every_check_has_a_fault() -> None:
    by_kind = {'kind="weights"': weights.CHECKS, 'kind="features"': fusions.FEATURES,
               'kind="outputs"': fusions.OUTPUTS, "zoo_backbones": backbones.CHECKS,
               "zoo_transfers": transfers.CHECKS, "zoo_datasets": datasets.CHECKS,
               "zoo": (*plugins.CHECKS[2:], *plugins.SPEC_CHECKS)}
    for mark, functions in by_kind.items():
        found = {name for plugin, _, _, name, _ in FAULTS if mark in plugin}
        assert {function.__name__ for function in functions} <= found
