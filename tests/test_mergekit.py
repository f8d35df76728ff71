"""mergekit's configurations: what they mean here, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import zoo
from zoo.cli import main
from zoo.errors import RecipeError
from zoo.merge_files.mergekit import METHODS, read_mergekit
from zoo.merge_files.stages import Stage, merge_stages
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


def sliced(*ranges: list[Any], other: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "slices": [
        {"sources": [{"model": "a", "layer_range": each},
                     {"model": "b", "layer_range": other or each}]} for each in ranges], **more}


def merged(config: dict[str, Any]) -> dict[str, float]:
    """What the first entry of each tensor becomes."""
    found = read(**config)
    zoo.merge(found.pop("inputs"), found.pop("strategy"), out="out", **found)
    return {key: tensor[0].item() for key, tensor in load_file("out/model.safetensors").items()}


def test_slices_of_whole_models_have_gradients_of_their_own() -> None:
    config = sliced([0, 2], [2, 3], parameters={"normalize": False, "weight": 1.0})
    first, last = config["slices"]
    first["parameters"] = {"weight": [{"filter": "mlp", "value": 0.5}, {"value": [0.1, 0.3]}]}
    first["sources"][1]["parameters"] = {"weight": 0.0}
    last["sources"][0]["parameters"] = {"weight": [0.6, 0.8]}  # one layer has the last
    last["sources"][1]["parameters"] = {"weight": [2.0, 3.0]}
    assert merged(config) == pytest.approx({
        "model.embed.weight": 0.1, "model.layers.0.attn.weight": 0.1,
        "model.layers.0.mlp.weight": 0.5, "model.layers.1.attn.weight": 0.3,
        "model.layers.1.mlp.weight": 0.5, "model.layers.2.attn.weight": 0.8 + 2 * 3,
        "model.layers.2.mlp.weight": 0.8 + 2 * 3, "lm_head.weight": 0.6 + 2 * 2})


def test_slerp_in_one_slice_is_a_merge_of_whole_models() -> None:
    config = sliced([0, 3], merge_method="slerp", base_model="a")
    found = read(**config, parameters={"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]})
    assert found == {"inputs": ["a", "b"], "strategy": "slerp", "convention": "mergekit",
                     "t": {"*mlp*": [0.0, 1.0], "*": 0.5}}


def test_parameters_differ_between_models_and_layers() -> None:
    found = read(merge_method="breadcrumbs", base_model="base", parameters={
        "density": 0.9, "lambda": [{"filter": "attn", "value": 2}, {"value": [1, 0, 1]}]},
        models=two({"density": 0.5, "gamma": [{"filter": "mlp", "value": 0.1}]}))
    assert found["density"] == [0.5, 0.9]
    assert found["gamma"] == [{"*mlp*": 0.1, "*": 0.01}, 0.01]  # or mergekit's default
    assert found["scale"] == {"*attn*": 2.0, "*": [1.0, 0.0, 1.0]}


@pytest.mark.parametrize(("flags", "over"), [
    ({}, None), ({"nuslerp_row_wise": True}, None), ({"nuslerp_flatten": False}, "rows"),
    ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, "columns")])
def test_nuslerp_says_by_two_flags_what_a_vector_is(flags: dict[str, bool], over: Any) -> None:
    assert read(merge_method="nuslerp", models=two(), parameters=flags).get("over") == over


def test_whole_numbers_along_the_layers_are_told_by_name() -> None:
    config = {"merge_method": "karcher", "models": two(), "parameters": {"max_iter": [5, 50]}}
    assert read(**config)["max_iter"] == {"model.layers.2.attn.weight": 50,
                                          "model.layers.2.mlp.weight": 50, "*": 5}
    merged(config)


@pytest.mark.parametrize(("method", "flag", "value"), [
    ("nuslerp", "nuslerp_flatten", False), ("nuslerp", "nuslerp_row_wise", True),
    ("model_stock", "filter_wise", True)])
def test_what_a_vector_is_holds_in_all_slices_or_is_refused(
    method: str, flag: str, value: bool
) -> None:
    base = {"base_model": "base"} if method == "model_stock" else {}
    config = sliced([0, 2], [2, 3], merge_method=method, **base)
    config["slices"][1]["parameters"] = {flag: value}
    with pytest.raises(RecipeError, match=rf"slices\[1\].parameters.{flag}: is .*for all layers"):
        read(**config)
    config["slices"][0]["parameters"] = {flag: value}  # both overrule the document
    everywhere = {**config, "parameters": {flag: not value}}
    assert read(**everywhere).get("over") == read(**config).get("over")
    assert read(**sliced([0, 3], merge_method=method, **base), parameters={flag: value}).get(
        "over") == read(**config).get("over")


def test_what_mergekit_ignores_is_told() -> None:
    with pytest.warns(UserWarning, match=r"models\[0\].parameters.lambda is ignored, as mergekit"):
        found = read(merge_method="ties", base_model="base", models=two({"lambda": 0.5}))
    assert "scale" not in found
    with pytest.warns(UserWarning, match="sce does not use it"):
        found = read(merge_method="sce", base_model="base", models=two({"weight": 2}))
    assert "weight" not in found
    with pytest.warns(UserWarning, match=r"models\[1\].weight is ignored, .* its 'parameters'"):
        read(merge_method="linear", models=[{"model": "a"}, {"model": "b", "weight": 2}])


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
    ({"merge_method": "linear", "modules": {}}, "modules: merging parts of models by different"),
    (sliced([0, 2], [2, 3], other=[1, 3]), r"slices\[0\].sources\[1\].layer_range: is \[1, 3\]"),
    (sliced([0, 2], [1, 3]), r"slices\[1\].sources\[0\].layer_range: begins at 1, expected 2"),
    (sliced([0, 2]), r"slices\[0\].sources\[0\].layer_range: ends at 2, and a has 3 layers"),
    (sliced([0, 4]), "ends at 4, and a has 3 layers"),
    (sliced([0, "3"]), r"layer_range: is \[0, '3'\], expected the first layer"),
    ({"merge_method": "nuslerp", "models": two(), "parameters": {"nuslerp_flatten": [True]}},
     "parameters.nuslerp_flatten: is .*for all layers"),
    ({"merge_method": "linear", "models": two({"weight": [{"filter": "mlp", "value": 1}]})},
     r"models\[0\].parameters.weight: no condition holds for 'lm_head.weight'"),
    ({"merge_method": "ties", "base_model": "base", "models": two(),
      "parameters": {"rescale": True}}, "parameters.rescale: ties keeps what it does not drop"),
    ({"merge_method": "linear", "model": []}, "did you mean 'models'"),
    ({"merge_method": "linear"}, "models: is None, expected a list of models"),
    ({"merge_method": "linear", "models": ["a"]}, r"models\[0\]: is 'a', expected a mapping"),
    ({"merge_method": "linear", "models": [{"model": "gone"}]}, "there is no folder 'gone'"),
    ({"merge_method": "slerp", "models": two()}, "slerp takes two models, of which base_model"),
    ({"merge_method": "slerp", "base_model": "a", "models": two()}, "parameters.t: is missing"),
    ({"merge_method": "ties", "base_model": "base", "models": two(),
      "parameters": {"densty": 0.1}}, "parameters.densty: ties has no such parameter here; did you "
                                      "mean 'density'"),
    ({"merge_method": "linear", "models": two({"weight": "much"})},
     r"models\[0\].parameters.weight: is 'much', expected a number"),
    ({"merge_method": "linear", "models": two({"weight": []})}, "expected a number"),
    ({"merge_method": "linear", "models": two({"weight": [
        {"filter": ["mlp"], "value": 1}, {"value": 2}]})}, r"weight: is .*expected a number"),
    ({"merge_method": "linear", "slices": []}, r"slices: is \[\], expected a list of slices"),
    ({"merge_method": "sce", "base_model": "base", "models": [{"model": "base"}],
      "parameters": {"select_topk": [0.1, 0.5]}}, "models: has no model but the base; sce needs"),
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


@pytest.mark.filterwarnings("ignore:batch norm's statistics")
def test_what_differs_between_layers_reaches_networks_with_running_statistics() -> None:
    keys = [f"{part}.{name}" for part in ("blocks.0.bn", "blocks.1.bn", "blocks.2.bn", "bn2")
            for name in ("weight", "running_mean", "running_var")]
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        save_file({key: torch.rand(20, generator=generator) for key in keys},
                  Path(name, "model.safetensors"))
    config = {"merge_method": "ties", "base_model": "base", "models": two(
        {"density": [0.2, 0.8]}, {"density": [{"filter": "running", "value": 0.1},
                                              {"value": 0.5}]})}
    merged(config)
    found = load_file("out/model.safetensors")
    by_name = {**dict.fromkeys(("blocks.0", "bn2"), 0.2), "blocks.1": 0.5, "blocks.2": 0.8}
    for part, density in by_name.items():
        key = next(key for key in keys if key.startswith(part) and key.endswith("weight"))
        zoo.merge(["a", "b"], "ties", base="base", out="alone", density=[density, 0.5],
                  convention="mergekit")
        assert torch.equal(found[key], load_file("alone/model.safetensors")[key]), key
    Path("two.yml").write_text(yaml.safe_dump_all([
        {**config, "name": "one"}, {"merge_method": "linear", "models": [
            {"model": "one"}, {"model": "a", "parameters": {"weight": 0.0}}]}]))
    with pytest.raises(SystemExit) as end:
        main(["merge", "--config", "two.yml", "-o", "again"])
    assert end.value.code == 0
    again = load_file("again/model.safetensors")
    assert all(torch.equal(again[key], found[key]) for key in keys if key.endswith("weight"))
    one = Stage("one", "ties", ("a", "b"), "base",  # measured over the model: one density for it
                {"density": {"*running*": 0.1, "*": 0.5}})
    merge_stages(Stage("last", "average", (one, "a"), None, {"weight": [1.0, 0.0]}), "staged")
    zoo.merge(["a", "b"], "ties", base="base", out="alone", density=0.5)
    staged, alone = (load_file(f"{out}/model.safetensors") for out in ("staged", "alone"))
    assert all(torch.equal(staged[key], alone[key]) for key in keys if key.endswith("weight"))
