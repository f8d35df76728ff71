"""The card of a saved model: what it says, what it keeps to itself, and whom it does not obey."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import Hub
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from small_models import fused
from torch.utils.data import TensorDataset

import zoo
from zoo.cli import main
from zoo.errors import OptionError
from zoo.evaluation import Evaluation
from zoo.model import Model

PICTURES = ["calibration.png", "comparison.png", "confusion.png"]
HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Mine", "<script>alert(1)</script>", "![p](http://evil.com/p.png)",
    "a | b", "`code`", "[here](http://evil.com) http://evil.com www.evil.com a@evil.com",
    "{{ 7 * 7 }}", "\u202egnp.exe", '"quoted": [1, *a, &b]', "**bold** _it_ ~~no~~ &amp; \\| $x$",
]


@pytest.fixture(scope="module")
def images() -> TensorDataset:
    pixels = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorDataset(pixels, torch.arange(24) % 3)


@pytest.fixture(scope="module")
def measured(images: TensorDataset) -> Evaluation:
    return zoo.evaluate(fused(), images, attacks={"fgsm": {"eps": 0.1}})


@pytest.fixture
def model() -> Model:
    """A copy whose provenance a test may change."""
    return copy.deepcopy(fused())


@pytest.fixture
def named(images: TensorDataset, tmp_path: Path) -> Callable[[list[str]], str]:
    """The card of a measured model whose classes, members and provenance have these names."""
    built = zoo.backbone("mnist_cnn", num_classes=len(HOSTILE), width=2, seed=0, device="cpu")
    told = zoo.evaluate(built, images)

    def save(names: list[str]) -> str:
        model = copy.deepcopy(built)
        (member,) = model.each_member()
        model.classes = member.classes = tuple(names)
        member.name = names[0]
        member.source = {"name": names[1], "repository": names[2], "license": names[3]}
        each = replace(told, per_class=dict(zip(names, told.per_class.values(), strict=True)))
        return card(zoo.save(model, tmp_path / "named", evaluations={
            names[4]: each, names[5]: each, "model": each}))

    return save


def card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def page(text: str) -> list[Any]:
    """The tokens of the page below the front matter, as a Hub would show it."""
    body = text.split("\n---\n", 1)[1]
    found = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
    return [each for token in found for each in (token, *(token.children or ()))]


def shape(tokens: list[Any]) -> list[tuple[str, str]]:
    return [(each.type, each.tag) for each in tokens
            if each.type not in ("text", "text_special", "code_inline")]


def rows(text: str, heading: str) -> list[list[str]]:
    part = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in part.splitlines() if line.startswith("|")]


class TestMeasured:
    def test_models_stand_side_by_side_with_intervals_and_attacks(
        self, measured: Evaluation, tmp_path: Path
    ) -> None:
        worse = replace(measured, accuracy=0.25, interval=(0.1, 0.5))
        folder = zoo.save(fused(), tmp_path / "m",
                          evaluations={"member 1": worse, "fused": measured})
        head, _, *found = rows(card(folder), "Measured")
        low, high = (f"{100 * each:.2f} %" for each in measured.interval)
        assert head == ["", "accuracy", "95 % interval", "NLL", "ECE", "under `fgsm`", "parameters"]
        assert found[0][:3] == ["member 1", "25.00 %", "10.00 % – 50.00 %"]
        assert found[1][:3] == ["fused", f"{100 * measured.accuracy:.2f} %", f"{low} – {high}"]
        assert found[1][5] == f"{100 * measured.attacks['fgsm']['accuracy']:.2f} %"
        assert "On the same 24 test images of its maker's own." in card(folder)

    def test_the_hub_reads_the_figures_back(self, measured: Evaluation, tmp_path: Path) -> None:
        named = replace(measured, data="hfds:org/digits")
        loaded = ModelCard.load(
            zoo.save(fused(), tmp_path / "m", evaluations={"fused": named}) / "README.md")
        found = {each.metric_name: each for each in loaded.data.eval_results or ()}
        assert found["accuracy"].metric_value == measured.accuracy
        assert found["accuracy"].dataset_name == "hfds:org/digits"
        assert found["accuracy under fgsm"].metric_args == {"eps": 0.1}
        assert loaded.data.datasets == ["org/digits"]
        assert loaded.data.metrics == ["accuracy"]

    def test_the_pictures_are_shown_and_pushed_once(
        self, measured: Evaluation, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", hub.token("me"))
        told = {"member 1": measured, "fused": measured}
        folder = zoo.save(fused(), tmp_path / "m", evaluations=told)
        shown = [each.attrGet("src") for each in page(card(folder)) if each.type == "image"]
        assert sorted(shown) == PICTURES == sorted(each.name for each in folder.glob("*.png"))
        first = zoo.push(folder, "me/fused")
        assert set(PICTURES) <= {each.name for each in first.files if each.state == "new"}
        again = zoo.push(zoo.save(fused(), tmp_path / "again", evaluations=told), "me/fused")
        assert (again.commit, again.uploaded) == (first.commit, 0)
        assert {each.name for each in zoo.pull("me/fused").glob("*.png")} == set(PICTURES)
        assert ModelCard.load("me/fused").data.eval_results

    def test_without_evaluations_it_says_that_nothing_was_measured(self, tmp_path: Path) -> None:
        folder = zoo.save(fused(), tmp_path / "m")
        assert "Nothing was measured" in card(folder)
        assert "## Measured" not in card(folder)
        assert not list(folder.glob("*.png"))

    def test_a_searched_fusion_shows_its_curve(self, images: TensorDataset, tmp_path: Path) -> None:
        members = [zoo.backbone("mnist_cnn", num_classes=3, width=2, seed=seed, device="cpu")
                   for seed in (1, 2, 3)]
        found = zoo.fuse(members[1:], "task_arithmetic", base=members[0],
                         search={"scale": [0.2, 0.6, 1.0]}, data=images)
        folder = zoo.save(found, tmp_path / "m")
        assert [each.name for each in folder.glob("*.png")] == ["interpolation.png"]
        assert "(interpolation.png)" in card(folder)

    def test_the_command_line_measures_and_writes_the_card_anew(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for seed, name in ((1, "a"), (2, "b")):
            zoo.save(zoo.backbone("mnist_cnn", num_classes=10, width=2, seed=seed, device="cpu"),
                     name)
        zoo.save(zoo.fuse([tmp_path / "a", tmp_path / "b"], "mean"),
                 "fused", max_shard_bytes=20_000)
        (tmp_path / "fused" / "LICENSE").write_text("mine")
        before = {file.name: file.read_bytes() for file in Path("fused").iterdir()}

        def command(*arguments: str) -> int:
            with pytest.raises(SystemExit) as end:
                main(["eval", *arguments, "--data", "digits"])
            return int(end.value.code or 0)

        assert command("fused", "--card", "--beside", str(tmp_path / "a"), "--beside", "b") == 0
        text = card(Path("fused"))
        assert [row[0] for row in rows(text, "Measured")[2:]] == ["a", "b", "fused"]
        assert "test images of `zoo/digits`" in text
        after = {file.name: file.read_bytes() for file in Path("fused").iterdir()}
        assert sorted(after.keys() - before.keys()) == PICTURES
        assert {name for name in before if before[name] != after[name]} == {"README.md"}
        assert command("fused", "--card") == 0
        assert not Path("fused/comparison.png").exists()
        capsys.readouterr()
        for wrong in (("zoo/mnist_cnn", "--card"), ("fused", "--beside", "a")):
            assert command(*wrong) != 0
            assert "--card writes the card of a saved model's folder" in capsys.readouterr().err

    def test_without_matplotlib_the_card_has_its_figures(
        self, measured: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        folder = zoo.save(fused(), tmp_path / "m", evaluations={"fused": measured})
        assert "## Measured" in card(folder)
        assert "![" not in card(folder)

    def test_what_is_not_of_this_model_or_these_images_is_refused(
        self, measured: Evaluation, tmp_path: Path
    ) -> None:
        refused: list[tuple[dict[str, Any], str]] = [
            ({"member 1": measured}, "nothing of the model that is saved; put that under 'fused'"),
            ({"fused": 0.9}, r"evaluations\['fused'\] is a float, expected what zoo.evaluate"),
            ({"model": replace(measured, parameters=5)}, "3 classes and 5 parameters, and this"),
            ({"fused": measured, "b": replace(measured, n=99)}, r"\['b'\] is of 99 images and 'fu"),
        ]
        for given, says in refused:
            with pytest.raises(OptionError, match=says):
                zoo.save(fused(), tmp_path / "m", evaluations=given)
        assert not (tmp_path / "m").exists()


class TestTrust:
    def test_a_hostile_name_is_only_a_name(self, named: Callable[[list[str]], str]) -> None:
        bad, good = named(HOSTILE), named([f"name{each}" for each in range(len(HOSTILE))])
        tokens = page(bad)
        assert shape(tokens) == shape(page(good))
        assert not {each.type for each in tokens} & {"html_inline", "html_block", "link_open"}
        front = yaml.safe_load(bad.split("---\n")[1])
        assert front.keys() == yaml.safe_load(good.split("---\n")[1]).keys() - {"base_model"}
        assert front["license"] == HOSTILE[3]
        assert ModelCard(bad).data.library_name == "fusion-zoo"
        shown = " ".join(each.content for each in tokens if not each.children)
        for name in (HOSTILE[1], HOSTILE[3], HOSTILE[4], HOSTILE[6], HOSTILE[8]):
            assert name in shown
        assert "\u202e" not in bad

    def test_what_is_only_typed_becomes_no_link(self, named: Callable[[list[str]], str]) -> None:
        """GitHub's Markdown makes links of bare addresses."""
        text = named(HOSTILE).split("## Made with")[0]
        assert "\\://evil" in text
        assert not re.search(r"https?://evil|www\.evil|a@evil", text, re.IGNORECASE)

    def test_nothing_of_this_machine_is_told(
        self, model: Model, measured: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        token = "hf_" + "s" * 30
        monkeypatch.setenv("HF_TOKEN", "planted-token")
        model.recipe["note"] = {"from": "/home/jo doe/a", "to": f"see ~jo/x and {token}",
                                "data": ["C:\\Users\\jo\\d.csv", "folder:/home/jo/pics", "a/b",
                                         "https://host.org/x/y", "planted-token"]}
        model.recipe["sources"][0]["name"] = "local-dir:/home/jo/models/first"
        text = card(zoo.save(model, tmp_path / "m", evaluations={
            "/home/jo/other": measured, f"with {token}": measured, "fused": measured}))
        for secret in ("jo", token, "planted-token", str(Path.home()), str(tmp_path)):
            assert secret not in text.replace("join", "").replace("\\", "")
        made = json.loads(text.split("```json\n")[1].split("\n```")[0])
        assert made["note"]["data"][:4] == ["d.csv", "pics", "a/b", "https://host.org/x/y"]
        assert rows(text, "Measured")[2][0] == "other"


class TestHowToUseIt:
    @pytest.mark.parametrize("in_chans", [3, 4])
    def test_what_it_shows_runs_as_it_stands(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        in_chans: int,
    ) -> None:
        model = zoo.backbone("test_vit", classes=["cat", "dog"], in_chans=in_chans, image_size=32,
                             seed=1, device="cpu")
        text = card(zoo.save(model, tmp_path / "path" / "to" / "this" / "folder"))
        monkeypatch.chdir(tmp_path)
        shown = [each.split("```")[0] for each in text.split("```python\n")[1:]]
        exec(shown.pop(0), {})
        assert capsys.readouterr().out.strip() in ("cat", "dog")
        plain = [each for each in shown if "timm" in each]
        assert len(plain) == (in_chans == 3)
        for each in plain:
            space: dict[str, Any] = {}
            exec(each, space)
            assert not space["net"].training
            assert space["transform"](Image.new("RGB", (50, 40))).shape == (3, 32, 32)

    def test_thousands_of_classes_do_not_bury_it(self, tmp_path: Path) -> None:
        members = [zoo.backbone("test_vit", classes=[f"kind {n}" for n in range(3000)],
                                image_size=32, seed=seed, device="cpu") for seed in (1, 2)]
        text = card(zoo.save(zoo.fuse(members, "average"), tmp_path / "m"))
        made = json.loads(text.split("```json\n")[1].split("\n```")[0])
        assert made["sources"][1]["recipe"]["fresh"]["classes"] == [
            "kind 0", "kind 1", "kind 2", "… 3,000 in all: config.json has them"]
        assert len(text) < 5000
        assert zoo.reproduce(tmp_path / "m").reproduced


class TestWhereItComesFrom:
    def test_sources_inside_sources_are_named_with_commit_and_hash(
        self, model: Model, tmp_path: Path
    ) -> None:
        commit, sha = "c" * 40, "d" * 64
        leaf = {"name": "timm/x", "repository": "timm/x.in1k", "revision": commit, "sha256": sha,
                "license": "cc-by-nc-4.0"}
        first, second = model.recipe["sources"]
        first["recipe"] = {"sources": [leaf, {"name": "made/here"}]}
        second |= {"repository": "org/two", "revision": commit, "license": "MIT"}
        folder = zoo.save(model, tmp_path / "m")
        data = ModelCard.load(folder / "README.md").data
        assert data.base_model == ["org/two", "timm/x.in1k"]
        assert data.to_dict()["base_model_relation"] == "merge"
        assert data.license == "cc-by-nc-4.0"
        found = rows(card(folder), "Provenance")
        assert ["`timm/x`", "`timm/x.in1k`", f"`{commit}`", f"`{sha}`"] in found
        assert found[-1][0] == "`model.safetensors`"
        told = card(folder).split("## Licences")[1].split("## ")[0]
        assert "The strictest of them holds for this model: cc-by-nc-4.0. Commercial use is" in told
        assert {tuple(row) for row in rows(card(folder), "Licences")} >= {
            ("`timm/x.in1k`", "cc-by-nc-4.0"), ("`org/two`", "mit")}

    @pytest.mark.parametrize(("licences", "says"), [
        (("mit", None), "No licence follows from these: the licence of"),
        ((None, None), "No pretrained weights with a licence of others are in it."),
    ])
    def test_what_cannot_be_told_is_not_made_up(
        self, model: Model, tmp_path: Path, licences: tuple[str | None, ...], says: str
    ) -> None:
        for source, licence in zip(model.recipe["sources"], licences, strict=True):
            source |= {"license": licence} if licence else {}
            source |= {"repository": "a/b"} if any(licences) else {}
        text = card(zoo.save(model, tmp_path / "m"))
        assert says in text
        assert "license:" not in text.split("\n---\n")[0]

    def test_what_trained_it_is_told_in_words(
        self, images: TensorDataset, tmp_path: Path
    ) -> None:
        teacher, model = (zoo.backbone("mnist_cnn", num_classes=3, seed=seed, device="cpu")
                          for seed in (1, 2))
        zoo.transfer(model, images, "distill", teachers=[teacher], epochs=1)
        zoo.transfer(model, images, "finetune", epochs=1)
        assert (f", one network, `zoo/mnist_cnn`. It was trained by `zoo/distill` on {len(images)} "
                "images, taught by `zoo/mnist_cnn`. Then it was trained by `zoo/finetune` on "
                f"{len(images)} images.\n") in card(zoo.save(model, tmp_path / "m"))

    def test_how_it_was_made_is_told_in_words_and_as_json(self, tmp_path: Path) -> None:
        text = card(zoo.save(fused(), tmp_path / "m"))
        assert "fused by `zoo/average` from 2 models. `zoo/average`: " in text
        assert "Its options: normalise = true." in text
        made: Mapping[str, Any] = json.loads(text.split("```json\n")[1].split("\n```")[0])
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        assert made == config["zoo"]["made_with"]
