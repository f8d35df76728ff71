"""mergekit's configurations: what they mean here, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from zoo.cli import main
from zoo.errors import RecipeError
from zoo.merge_files.mergekit import METHODS, read_mergekit
from zoo.registry import find
from zoo.specs import FusionSpec

KEYS = ("model.embed.weight", *(f"model.layers.{n}.{part}.weight" for n in range(3)
                                for part in ("attn", "mlp")), "lm_head.weight")


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("base", "a", "b")):
        Path(name).mkdir()
        save_file({key: torch.full((2,), float(place)) for key in KEYS},
                  Path(name, "model.safetensors"))


def read(**config: Any) -> dict[str, Any]:
    Path("m.yml").write_text(yaml.safe_dump(config))
    return read_mergekit("m.yml")


def two(one: Any = None, other: Any = None) -> list[dict[str, Any]]:
    return [{"model": "a", "parameters": one or {}}, {"model": "b", "parameters": other or {}}]


def test_every_method_is_one_of_ours() -> None:
    for strategy in METHODS.values():
        assert find(strategy, FusionSpec).kind == "weights"


def test_a_configuration_of_task_vectors() -> None:
    found = read(merge_method="ties", base_model="base", dtype="bfloat16",
                 models=[{"model": "base"}, *two({"weight": 0.7, "density": 0.5},
                                                 {"weight": 0.2, "density": 0.5})],
                 parameters={"normalize": False, "int8_mask": True, "lambda": 0.9})
    assert found == {"inputs": ["a", "b"], "strategy": "ties", "base": "base", "dtype": "bfloat16",
                     "weight": [0.7, 0.2], "density": 0.5, "normalise": False, "scale": 0.9,
                     "convention": "mergekit"}


def test_slerp_runs_from_the_base_to_the_other() -> None:
    found = read(merge_method="slerp", base_model="b", models=two(), parameters={"t": 0.3})
    assert found["inputs"] == ["b", "a"]
    assert found["t"] == 0.3
    assert "base" not in found


def test_weights_by_filter_and_along_the_depth() -> None:
    by_filter = [{"filter": "mlp", "value": 1.0}, {"value": [0.2, 0.6]}]
    Path("m.yml").write_text(yaml.safe_dump({
        "merge_method": "linear", "models": two({"weight": by_filter}, {"weight": [0.0, 1.0]})}))
    with pytest.raises(SystemExit) as end:
        main(["merge", "--config", "m.yml", "-o", "out"])
    assert end.value.code == 0
    merged = load_file("out/model.safetensors")
    weights = {"attn": ([0.2, 0.4, 0.6], [0, 0.5, 1]), "mlp": ([1, 1, 1], [0, 0.5, 1])}
    for part, (one, other) in weights.items():
        for layer in range(3):
            expected = (one[layer] + 2 * other[layer]) / (one[layer] + other[layer])
            key = f"model.layers.{layer}.{part}.weight"
            assert merged[key][0].item() == pytest.approx(expected), key
    assert merged["lm_head.weight"].tolist() == [1, 1]  # in no layer: the first numbers


def test_a_repository_is_one_of_the_hub() -> None:
    found = read(merge_method="linear", models=[{"model": "org/name@main"}, {"model": "a"}])
    assert found["inputs"] == ["hf-hub:org/name@main", "a"]


@pytest.mark.parametrize(("config", "message"), [
    ({"merge_method": "tiez", "models": []}, "merge_method: 'tiez' is not known here; did you mean "
                                             "'ties'"),
    ({"merge_method": "linear", "slices": []}, "slices: cutting models into layers"),
    ({"merge_method": "linear", "model": []}, "did you mean 'models'"),
    ({"merge_method": "linear"}, "models: is None, expected a list of models"),
    ({"merge_method": "linear", "models": ["a"]}, r"models\[0\]: is 'a', expected a mapping"),
    ({"merge_method": "linear", "models": [{"model": "gone"}]}, "there is no folder 'gone'"),
    ({"merge_method": "slerp", "models": two()}, "slerp takes two models, of which base_model"),
    ({"merge_method": "slerp", "base_model": "a", "models": two()}, "parameters.t: is missing"),
    ({"merge_method": "ties", "base_model": "base", "models": two({"density": 0.1},
                                                                  {"density": 0.2})},
     r"parameters.density: differs between the models, \[0.1, 0.2\]"),
    ({"merge_method": "ties", "base_model": "base", "models": two(),
      "parameters": {"densty": 0.1}}, "parameters.densty: ties has no such parameter here; did you "
                                      "mean 'density'"),
    ({"merge_method": "linear", "models": two({"weight": "much"})},
     r"models\[0\].parameters.weight: is 'much', expected a number"),
    ({"merge_method": "linear", "models": two({"weight": []})}, "expected a number"),
])
def test_what_has_no_counterpart_is_refused_by_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(**config)


def test_a_damaged_file_is_named() -> None:
    Path("m.yml").write_text("merge_method: [")
    with pytest.raises(RecipeError, match=r"m\.yml"):
        read_mergekit("m.yml")
    with pytest.raises(RecipeError, match=r"gone\.yml"):
        read_mergekit("gone.yml")
    Path("m.yml").write_text(json.dumps([1]))
    with pytest.raises(RecipeError, match="expected a mapping"):
        read_mergekit("m.yml")
