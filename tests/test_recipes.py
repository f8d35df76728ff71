from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.errors import RecipeError
from zoo.pipeline.dry_run import dry_run
from zoo.pipeline.recipes import read_recipe

RECIPE = """\
data:
  target:
    train: {data: zoo/digits, limit: 60}
    test: {data: zoo/digits, limit: 40}
source:
  backbone: zoo/mnist_cnn
  pretrained: false
  transfer: {method: finetune}
target:
  backbone: zoo/mnist_cnn
  from: source
  transfer:
    method: finetune
    lr: 1e-3
fuse:
  strategy: ties
  density: 0.5
update: {method: self_distill}
evaluate: {attacks: {fgsm: {eps: 0.1}}}
"""


def problems(tmp_path: Path, *changes: tuple[str, str], recipe: str = RECIPE) -> list[str]:
    """What is told of the recipe with these replacements, each line without the file's name."""
    for old, new in changes:
        assert recipe.count(old) == 1, old
        recipe = recipe.replace(old, new)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    with pytest.raises(RecipeError) as caught:
        dry_run(read_recipe(file))
    told = str(caught.value).splitlines()
    assert all(line.startswith(f"{file}:") for line in told)
    assert len(caught.value.problems) == len(told)
    return [line.removeprefix(f"{file}:").partition(" For a Hub")[0] for line in told]


def test_a_good_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    dry_run(recipe)
    assert recipe.data.target.val == 0.1
    assert recipe.target.transfer.arguments == {"lr": 0.001}
    assert recipe.fuse.options == {"density": 0.5}
    assert (recipe.save, recipe.seed) == ("fused", 0)
    assert recipe.baseline.backbone == "zoo/mnist_cnn"
    assert recipe.home == tmp_path


def test_the_examples_are_right() -> None:
    for file in Path("examples").glob("*.yaml"):
        dry_run(read_recipe(file))


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"recipe\.yaml: cannot be read: No such file"):
        read_recipe(file)
    file.write_text("data: [1, 2\nsource: 3")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: is not YAML: while parsing a flow seq"):
        read_recipe(file)
    file.write_text("data: {a: 1}\n\tsource: 3")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: is not YAML: .*'\\t'"):
        read_recipe(file)
    file.write_text("- data\n")
    with pytest.raises(RecipeError, match=r":1: is no recipe: expected data, source, target, fuse"):
        read_recipe(file)
    file.write_bytes(b"data: \xff")
    with pytest.raises(RecipeError, match=r"is not UTF-8"):
        read_recipe(file)


def test_a_field_that_stands_twice(tmp_path: Path) -> None:
    assert problems(tmp_path, ("  density: 0.5", "  density: 0.5\n  density: 0.6")) == [
        "18: fuse.density: stands here twice"]


def test_fields_are_told_with_line_and_nearest_name(tmp_path: Path) -> None:
    assert problems(
        tmp_path, ("train: {data: zoo/digits, limit: 60}", "train: {data: zoo/digits, limt: 60}"),
        ("limit: 40", "limit: many"), ("from: source", "from: sauce"),
        ("    lr: 1e-3", "    lr: -1"), ("fuse:\n  strategy: ties\n  density: 0.5\n", ""),
        ("evaluate:", "evaluat:"),
    ) == [
        "1: fuse: is missing",
        "3: data.target.train.limt: is no field here; did you mean 'limit'?",
        "4: data.target.test.limit: input should be a valid integer, unable to parse string as an "
        "integer (it is 'many')",
        "11: target.from: input should be 'source' (it is 'sauce')",
        "14: target.transfer.lr: input should be greater than 0 (it is -1)",
        "16: evaluat: is no field here; did you mean 'evaluate'?",
    ]


@pytest.mark.parametrize(("val", "told"), [
    ("2", "data.target.val: input should be less than 1 (it is 2)"),
    ("{dta: x}", "data.target.val.data: is missing"),
    ("{data: x, split: 3}", "data.target.val.split: input should be a valid string (it is 3)"),
    ("[1]", "data.target.val: input should be a valid dictionary or instance of Data (it is [1])"),
])
def test_val_is_a_share_or_data(tmp_path: Path, val: str, told: str) -> None:
    assert f"4: {told}" in problems(
        tmp_path, ("    test:", f"    val: {val}\n    test:"))


def test_names_and_options_are_told_all_at_once(tmp_path: Path) -> None:
    assert problems(
        tmp_path,
        ("backbone: zoo/mnist_cnn\n  pretrained", "backbone: zoo/mnist_ccn\n  pretrained"),
        ("transfer: {method: finetune}", "transfer: {method: zoo/finetun}"),
        ("  from: source", "  from: source\n  width: two\n  drop_rte: 0.5"),
        ("    lr: 1e-3", "    optimzer: adam\n    norms: frozn\n    hint: far"),
        ("strategy: ties", "strategy: zoo/tise"),
        ("{fgsm: {eps: 0.1}}", "{fgms: {}, fgsm: {}, pgd: {eps: big}}"),
    ) == [
        "6: source.backbone: no backbone is called 'zoo/mnist_ccn'; did you mean 'zoo/mnist_cnn'?",
        "8: source.transfer.method: no transfer is called 'zoo/finetun'; did you mean "
        "'zoo/finetune'?",
        "12: target.width: zoo/mnist_cnn: the option 'width' is 'two': input should be a valid "
        "integer",
        "13: target.drop_rte: zoo/mnist_cnn has no such option; did you mean 'drop_rate'?",
        "16: target.transfer.optimzer: zoo/finetune has no such option; did you mean 'optimizer'?",
        "17: target.transfer.norms: zoo/finetune: the option 'norms' is 'frozn': input should be "
        "'auto', 'train' or 'frozen'",
        "18: target.transfer.hint: zoo/finetune: the option 'hint' is 'far': input should be a "
        "valid number",
        "20: fuse.strategy: no fusion is called 'zoo/tise'; did you mean 'zoo/ties', "
        "'zoo/se' or 'zoo/wise_ft'?",
        "23: evaluate.attacks.fgms: no attack is called 'fgms'; did you mean 'fgsm'?",
        "23: evaluate.attacks.fgsm: fgsm: the option 'eps' must be given; its options are eps",
        "23: evaluate.attacks.pgd.eps: pgd: the option 'eps' is 'big': input should be a valid "
        "number",
    ]


def test_values_that_only_a_strategy_can_judge_are_tried_out(tmp_path: Path) -> None:
    told = problems(
        tmp_path, ("  from: source", "  from: source\n  width: -2"),
        ("transfer: {method: finetune}", "transfer: {method: finetune, optimizer: adamz}\n"
                                         "  width: -2"),
        ("    lr: 1e-3", "    schedule: cosin"), ("density: 0.5", "density: 2.5"),
        ("{method: self_distill}", "{method: self_distill, temperature: -1}"))
    assert [line.partition(": ")[0] + ": " + line.split(": ")[1] for line in told] == [
        "8: source.transfer.optimizer", "9: source.width", "13: target.width",
        "16: target.transfer.schedule", "19: fuse.density", "20: update.temperature"]
    assert "timm cannot make the optimizer 'adamz'" in told[0]
    assert "did you mean 'cosine'?" in told[3]
    assert "density is 2.5, expected a fraction in (0, 1]" in told[4]


def test_what_cannot_be_done_together(tmp_path: Path) -> None:
    assert problems(
        tmp_path, ("pretrained: false", "pretrained: true"),
        ("  from: source", "  from: source\n  width: 2"),
        ("{method: self_distill}", "{method: dann}"),
    ) == [
        "7: source.pretrained: zoo/mnist_cnn has no published weights; write 'pretrained: false'",
        "17: fuse.strategy: zoo/ties fuses weights, and the source (zoo/mnist_cnn) and the target "
        "(zoo/mnist_cnn) are not one network with the same options; 'concat' and 'weighted' fuse "
        "any two",
        "19: update.method: dann adapts to unlabelled images; say where they are in "
        "data.target.unlabelled",
    ]
    assert problems(tmp_path, ("strategy: ties\n  density: 0.5", "strategy: mean\n  norms: auto"),
                    ) == ["17: fuse.norms: zoo/mean fuses no weights; leave it out"]


NESTED = ("strategy: ties\n  density: 0.5", """strategy: average
  weight: [1, 2]
  members:
    - source
    - {strategy: ties, density: 0.5, members: [target, source]}""")


def test_members_may_be_fusions(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace(*NESTED))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    dry_run(recipe)
    assert [place for place, _ in recipe.fuse.fusions(("fuse",))] == [
        ("fuse",), ("fuse", "members", "1")]


@pytest.mark.parametrize(("value", "told"), [
    ('weight: {"*": [1, 2, 3]}', "18: fuse.weight: zoo/ties: weight is [1, 2, 3], expected a"),
    ('weight: {"conv*": 1, "*": many}', "18: fuse.weight: zoo/ties: weight is 'many', expected"),
    ("scale: {0: 1}", "18: fuse.scale: zoo/ties: a scale pattern is 0, expected text"),
    ('scale: {"conv*": 0.5, "*": [1, a]}', "18: fuse.scale: zoo/ties: the option 'scale' is 'a'"),
    ('scale: {"conv*": 0.5, "*": [1, .inf]}', "18: fuse.scale: zoo/ties: the option 'scale'"),
    ('normalise: {"conv*": true, "*": 1}', "18: fuse.normalise: zoo/ties: the option"),
])
def test_a_value_by_pattern_is_looked_at_before_the_trainings(
    tmp_path: Path, value: str, told: str
) -> None:
    found, = problems(tmp_path, ("density: 0.5", f"density: 0.5\n  {value}"))
    assert found.startswith(told)


def test_patterns_fit_the_real_networks_only(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("density: 0.5", """density: 0.5
  weight: {"layers.*": [1, [0.5, 2]], "*": 1}
  scale: {"layers.*": [0.1, 1], "*": 0}"""))
    dry_run(read_recipe(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(("change", "told"), [
    (("strategy: ties", "strategy: tise"), ["20: fuse.members.1.strategy: no fusion is called"]),
    (("strategy: ties", "strateg: ties"), [
        "20: fuse.members.1.strategy: is missing"]),
    (("density: 0.5", "density: 2"), ["20: fuse.members.1.density: ties: density is 2"]),
    (("density: 0.5", "desnity: 2"), ["20: fuse.members.1.desnity: zoo/ties has no such option; did"
                                      " you mean 'density'?"]),
    (("density: 0.5", "members: [sorce]"), ["20: fuse.members.1.members: stands here twice"]),
    (("[target, source]", "[target, sorce]"), ["20: fuse.members.1.members.1: no backbone is"]),
    (("[target, source]", "[target, ./gone]"), [
        "20: fuse.members.1.members.1: there is no file or folder "]),
    (("[target, source]", "[]"), ["20: fuse.members.1.members: list should have at least 1 item"]),
    (("[target, source]", "[1, target]"), [
        "20: fuse.members.1.members.0: input should be a valid"]),
    (("    - source\n", ""), ["18: fuse.members: zoo/average cannot fuse"]),
    (("  weight: [1, 2]", "  weight: [1, 2, 3]"), ["17: fuse.weight: "]),
    (("  weight: [1, 2]", "  base: source"), [
        "17: fuse.base: zoo/average does not use a base; leave it out"]),
    (("{strategy: ties, density: 0.5,", "{strategy: concat,"), [
        "20: fuse.members.1: zoo/average fuses weights, and this is a fusion of features"]),
    (("{strategy: ties, density: 0.5,", "{strategy: concat, transfer: {method: probe},"), [
        "20: fuse.members.1.transfer.method: no transfer is called 'probe'"]),
    (("  from: source", "  from: source\n  width: 2"), [
        "17: fuse.strategy: zoo/average fuses weights, and the source",
        "21: fuse.members.1.strategy: zoo/ties fuses weights, and the source"]),
])
def test_what_is_wrong_in_a_member_is_told_there(
    tmp_path: Path, change: tuple[str, str], told: list[str]
) -> None:
    recipe = RECIPE.replace(*NESTED)
    found = problems(tmp_path, change, recipe=recipe)
    assert len(found) == len(told), found
    for line in told:
        assert any(each.startswith(line) for each in found), found


def test_unlabelled_images_that_nothing_learns_from(tmp_path: Path) -> None:
    recipe = copy.deepcopy(DATA)
    recipe["data"]["target"]["unlabelled"] = "zoo/digits"
    with pytest.warns(UserWarning, match=r"no step of this recipe learns from data\.target\.unlab"):
        dry_run(read_recipe(recipe))


def test_a_baseline_that_cannot_be_trained_like_the_target(tmp_path: Path) -> None:
    told = problems(tmp_path, ("strategy: ties\n  density: 0.5", "strategy: concat"),
                    ("    method: finetune\n    lr: 1e-3", "    method: self_distill"),
                    ("  from: source", "  from: source\n  width: 2"))
    assert told == ["1: everything: as a baseline, which has no teacher: zoo/self_distill: there "
                    "is no teacher; pass teachers=[fused_model]"]


@pytest.mark.parametrize("place", ["../out", "/out", "steps/fused", "''"])
def test_the_fused_model_is_saved_inside_the_run(tmp_path: Path, place: str) -> None:
    told = problems(tmp_path, ("update:", f"save: {place}\nupdate:"))
    assert told[0].startswith("18: save: expected the name of a folder inside the run's own")


def test_a_recipe_as_a_mapping() -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe({"data": {"target": {"train": "a.csv"}}})
    assert str(caught.value).splitlines() == [
        "recipe: data.target.test: is missing", "recipe: source: is missing",
        "recipe: target: is missing", "recipe: fuse: is missing"]


def test_relative_paths_start_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "photos").mkdir()
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.data_place("train.csv") == str(tmp_path / "train.csv")
    assert recipe.data_place("photos") == str(tmp_path / "photos")
    assert recipe.data_place("folder:photos") == f"folder:{tmp_path / 'photos'}"
    assert recipe.data_place("/data/x.csv") == "/data/x.csv"
    assert recipe.data_place("zoo/digits") == "zoo/digits"
    assert recipe.data_place("hfds:mnist") == "hfds:mnist"
    assert recipe.model_place("./model") == str(tmp_path / "model")
    assert recipe.model_place("local-dir:model") == f"local-dir:{tmp_path / 'model'}"
    assert recipe.model_place("photos") == "photos"


DATA: dict[str, Any] = {
    "data": {"target": {"train": "zoo/digits", "test": "zoo/digits"}},
    "source": {"backbone": "zoo/mnist_cnn", "pretrained": False},
    "target": {"backbone": "zoo/mnist_cnn"}, "fuse": {"strategy": "mean"},
}


@pytest.mark.parametrize(("field", "value", "told"), [
    ("train", "missing.csv", "data.target.train: {home}/missing.csv: there is no such file"),
    ("train", "zoo/digit", "data.target.train: no dataset is called 'zoo/digit'; did you mean "
                           "'zoo/digits'?"),
    ("test", {"data": "zoo/digits", "split": "tset"}, "data.target.test: zoo/digits has no split"),
    ("test", {"data": "zoo/digits", "split": "train"}, "data.target.test: these are the images of "
                                                       "data.target.train"),
    ("val", {"data": "zoo/digits", "split": "test"}, "data.target.test: these are the images of "
                                                     "data.target.val"),
    ("val", {"data": "zoo/digits", "limit": 9}, "data.target.val: these are the images of "
                                                "data.target.train"),
    ("val", 1e-9, "data.target.val: cannot hold out 1e-09 of 1000 images"),
    ("unlabelled", "nowhere/", "data.target.unlabelled: "),
])
def test_data_are_opened_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = copy.deepcopy(DATA)
    recipe["data"]["target"][field] = value
    if field == "unlabelled":
        recipe["source"]["transfer"] = {"method": "dann"}
    with pytest.raises(RecipeError) as caught:
        zoo.run(recipe, tmp_path / "out")
    assert f"recipe: {told.format(home=tmp_path)}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_test_set_may_not_have_other_classes(tmp_path: Path) -> None:
    from PIL import Image

    for part, names in (("train", ("cat", "dog")), ("test", ("cat", "cow"))):
        for name in names:
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    recipe = {**DATA, "data": {"target": {"train": str(tmp_path / "train"), "val": 0.4,
                                          "test": str(tmp_path / "test")}}}
    with pytest.raises(RecipeError, match=r"data\.target\.test: the data have a class 'cow'"):
        zoo.run(recipe, tmp_path / "out")
