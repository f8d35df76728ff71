"""Specs: what they refuse, that they stay as they are, and their plain form."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from zoo.errors import SpecError
from zoo.specs import (
    AnySpec,
    BackboneSpec,
    Catalog,
    DatasetSpec,
    FusionSpec,
    TransferSpec,
    described,
)

BUILD = "zoo_acme.gated:build"
SCOPE = {"convention": {"paper": "model", "mergekit": "tensor"}}


def fusion(**fields: Any) -> FusionSpec:
    return FusionSpec(**{"name": "gated", "build": BUILD, "kind": "weights", **fields})


@pytest.mark.parametrize(("kind", "fields", "message"), [
    (FusionSpec, {"name": "no good"}, "name is 'no good', expected letters, digits and '._+-'"),
    (FusionSpec, {"name": 3}, "FusionSpec(3): name is 3"),
    (FusionSpec, {"build": "zoo_acme.gated"}, "build is 'zoo_acme.gated', expected 'module:attr"),
    (FusionSpec, {"loads_since": "next"}, "loads_since is 'next', expected a version, like '0.3'"),
    (FusionSpec, {"summary": None}, "summary is None, expected text"),
    (FusionSpec, {"aliases": "old"}, "aliases is 'old', expected a sequence"),
    (FusionSpec, {"aliases": [3]}, "aliases is (3,), expected a sequence of names"),
    (FusionSpec, {"kind": "wieghts"}, "expected 'weights' or 'features' or 'outputs'"),
    (FusionSpec, {"members": 2}, "members is 2, expected a sequence"),
    (FusionSpec, {"members": (2, "many")}, "expected (fewest, most or None)"),
    (FusionSpec, {"members": (3, 2)}, "expected (fewest, most or None)"),
    (FusionSpec, {"members": (0, None)}, "expected (fewest, most or None)"),
    (FusionSpec, {"uses": "base"}, "uses is 'base', expected a sequence"),
    (FusionSpec, {"uses": {"bases"}}, "expected a subset of ['base', 'data'"),
    (FusionSpec, {"scope": "layer"}, "expected 'slice' or 'rows' or 'tensor' or 'model'"),
    (FusionSpec, {"scope": {"convention": "model"}}, "or {option: {value: one of these}}"),
    (FusionSpec, {"scope": 3}, "scope is 3, expected 'slice'"),
    (FusionSpec, {"measure": "zoo_acme"}, "measure is 'zoo_acme', expected 'module:attribute'"),
    (FusionSpec, {"takes": "images"}, "takes is 'images', expected 'vectors'"),
    (TransferSpec, {"uses": {"data"}}, "uses is frozenset({'data'}), expected a subset of"),
    (TransferSpec, {"family": "modern"}, "family is 'modern', expected 'traditional' or"),
    (BackboneSpec, {"input_size": (224, 224)}, "expected (channels, height, width)"),
    (BackboneSpec, {"input_size": (3, 224, "big")}, "expected (channels, height, width)"),
    (BackboneSpec, {"feature_dim": -1}, "feature_dim is -1, expected a whole number"),
    (BackboneSpec, {"weights": None}, "weights is None, expected text"),
    (DatasetSpec, {"splits": ()}, "splits is (), expected at least one name"),
])
def test_a_wrong_field_is_named_with_what_was_expected(
    kind: type[AnySpec], fields: dict[str, Any], message: str
) -> None:
    right: dict[str, Any] = {"name": "gated", "build": BUILD}
    if kind is FusionSpec:
        right["kind"] = "weights"
    kind(**right)
    with pytest.raises(SpecError) as caught:
        kind(**{**right, **fields})
    assert message in str(caught.value)


def test_specs_are_keyword_only_and_frozen() -> None:
    spec = fusion(scope=SCOPE, uses=["base"], aliases=["old"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.scope["convention"] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        spec.scope["convention"]["paper"] = "slice"  # type: ignore[index]
    with pytest.raises(TypeError):
        FusionSpec("gated", BUILD)  # type: ignore[misc, call-arg]
    assert spec.uses == frozenset({"base"})
    assert spec.aliases == ("old",)


def test_a_spec_does_not_follow_the_mapping_that_it_was_made_of() -> None:
    scope = copy.deepcopy(SCOPE)
    spec = fusion(scope=scope)
    scope["convention"]["paper"] = "slice"
    assert described(spec)["scope"] == SCOPE


@pytest.mark.parametrize("spec", [
    fusion(scope=SCOPE, uses={"data", "base"}), fusion(),
    TransferSpec(name="probe", build=BUILD, uses={"teachers"}),
    BackboneSpec(name="net", build=BUILD), DatasetSpec(name="digits", build=BUILD),
])
def test_described_is_json_with_every_field(spec: AnySpec) -> None:
    plain = described(spec)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["type"] == spec.kind_name
    assert {field.name for field in dataclasses.fields(spec)} < set(plain)


def test_a_catalogue_is_told_by_its_methods() -> None:
    class Whole:
        def find(self, name: str) -> None: ...
        def search(self, pattern: str) -> list[str]:
            return []

    class Half:
        def find(self, name: str) -> None: ...

    assert isinstance(Whole(), Catalog)
    assert not isinstance(Half(), Catalog)
