from __future__ import annotations

from pathlib import Path

import pytest

from zoo.errors import BadName
from zoo.names import Address, Name, canonical_namespace, is_path, natural, parse, suggest


@pytest.mark.parametrize(("given", "expected"), [
    ("timm/resnet18.a1_in1k", Name("timm", "resnet18.a1_in1k")),
    ("my_acme/gated", Name("my-acme", "gated")),
    ("ties", Name(None, "ties")),
    ("hf-hub:org/name", Address("hf-hub", "org/name")),
    ("hf-hub:org/name@v1", Address("hf-hub", "org/name", "v1")),
    ("local-dir:models/a", Address("local-dir", "models/a")),
    ("folder:photos", Address("folder", "photos")),
    ("./model", Path("model")),
    ("/abs/model", Path("/abs/model")),
    ("C:\\models", Path("C:\\models")),
    (Path("plain"), Path("plain")),
])
def test_a_spelling_is_a_name_an_address_or_a_path(given: str, expected: object) -> None:
    assert parse(given) == expected


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert parse("~/model") == Path("/somewhere/model")


@pytest.mark.parametrize("spelling", ["timm/resnet18", "ties", "hf-hub:org/name@main"])
def test_printing_gives_the_spelling_back(spelling: str) -> None:
    assert str(parse(spelling)) == spelling


@pytest.mark.parametrize(("given", "message"), [
    ("", "it is empty"),
    ("a/b/c", "a name has one slash; write './a/b/c' for a path"),
    ("Org/Name", "for a Hub repository write 'hf-hub:Org/Name', for a path './Org/Name'"),
    ("ties!", "letters, digits and '._+-' make a name"),
    ("hf-hb:org/name", "'hf-hb' is no address scheme; did you mean 'hf-hub'?"),
    ("hf-hub:", "nothing follows the colon"),
    ("hf-hub:org/name@", "nothing follows the '@'"),
    ("https://huggingface.co/org/name", "it is the address of a page; write 'hf-hub:org/name'"),
    ("https://huggingface.co/org/name/tree/dev%2Fx", "; write 'hf-hub:org/name@dev/x'"),
    ("http://hf.co/org/name/blob/main/a/config.json?x=1#L2", "; write 'hf-hub:org/name@main'"),
    ("hf-hub:https://huggingface.co/org/name/", "; write 'hf-hub:org/name'"),
    ("https://huggingface.co/datasets/org/name", "'https' is no address scheme"),
    ("https://host.org/org/name.csv", "'https' is no address scheme"),
    ("hf-hub:../../etc", "a Hub address is 'hf-hub:org/name' or 'hf-hub:org/name@revision'"),
])
def test_what_is_no_name_says_why_and_what_to_write(given: str, message: str) -> None:
    with pytest.raises(BadName) as caught:
        parse(given)
    assert message in str(caught.value)
    assert caught.value.given == given


def test_namespaces_have_one_spelling() -> None:
    assert canonical_namespace("my_acme") == canonical_namespace("my-acme") == "my-acme"
    with pytest.raises(BadName, match="a letter first"):
        canonical_namespace("9acme")


def test_paths_are_told_by_their_spelling_alone() -> None:
    assert is_path("./no-such-thing")
    assert is_path("~")
    assert not is_path("timm/resnet18")
    assert not is_path("hf-hub:org/name")


def test_suggestions_forgive_case_and_separators() -> None:
    assert suggest("WISEFT", ["wise_ft", "ties"]) == ["wise_ft"]
    assert suggest("xyzzy", ["wise_ft", "ties"]) == []


def test_numbers_count_in_the_natural_order() -> None:
    names = ["resnet18", "resnet9", "ResNet10", "10", "9", "²", "a²", "x", "b2c10", "b2c9"]
    assert sorted(names, key=natural) == [
        "9", "10", "a²", "b2c9", "b2c10", "resnet9", "ResNet10", "resnet18", "x", "²"]


def test_the_natural_order_does_not_depend_on_the_input() -> None:
    assert sorted(["a", "A"], key=natural) == sorted(["A", "a"], key=natural)
