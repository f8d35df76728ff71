"""Every snippet and command in the documentation runs, in order, page by page."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from zoo import discovery
from zoo.cli import main
from zoo.datasets import load_data

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")),
         *sorted(ROOT.glob("plugins/*/README.md"))]
# Run by .ci/run, not here: the demo takes minutes, and the suite cannot run itself.
ELSEWHERE = ("git clone", "make ", ".ci/run", "zoo run examples/")


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    found = re.findall(r"```(\w+)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv, val.csv and test.csv with real digits as PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = load_data("digits", role="train").take(160)
    rows: list[str] = []
    for number in range(len(digits)):
        image, label = digits[number]
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{label}")
    for name, part in (("train", rows[:100]), ("val", rows[100:130]), ("test", rows[130:])):
        # Every part has every class, whatever the split left in it.
        every = {row.split(",")[1]: row for row in rows}
        (folder / f"{name}.csv").write_text("\n".join(["path,label", *part, *every.values()]))
    return folder


@pytest.fixture
def workplace(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    for file in pictures.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("zoo_acme"):
            del sys.modules[name]
    discovery.reset()


@pytest.mark.filterwarnings("ignore:batch norm's statistics were pooled")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_snippet_runs(page: Path, workplace: Path) -> None:
    names: dict[str, object] = {}
    for language, text in blocks(page, "python", "console"):
        file = re.match(r"# (zoo_acme/\w+\.py)\n", text)
        if file:
            (workplace / file[1]).parent.mkdir(exist_ok=True)
            (workplace / file[1]).write_text(text)
        elif language == "console":
            for line in text.splitlines():
                _run(line.partition("  #")[0].strip())
        elif "path/to" not in text:
            exec(compile(text, page.name, "exec"), names)
    if page.name == "plugins.md":
        _use_plugin(workplace, page)


def _run(line: str) -> None:
    command = line.split(" && ")[0]
    if not command or command.startswith(ELSEWHERE):
        return
    assert command.startswith("zoo "), f"nobody runs this: {line}"
    try:
        main(shlex.split(command)[1:])
    except SystemExit as end:
        assert end.code in (0, None), f"{command} ended with {end.code}"


def _use_plugin(workplace: Path, page: Path) -> None:
    """The tutorial's plugin, installed from its own toml, fuses two models."""
    import tomllib

    project = tomllib.loads(blocks(page, "toml")[0][1])["project"]
    info = workplace / "fusion_zoo_acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n")
    entries = project["entry-points"]["zoo.plugins"]
    (info / "entry_points.txt").write_text("[zoo.plugins]\n" + "\n".join(
        f"{name} = {module}" for name, module in entries.items()))
    discovery.reset()
    for seed in ("0", "1"):
        main_quietly("transfer", "zoo/mnist_cnn", "--no-pretrained", "--data", "train.csv",
                     "--epochs", "1", "--seed", seed, "-o", "ab"[int(seed)])
    main_quietly("show", "acme/median")
    main_quietly("fuse", "a", "b", "--with", "acme/median", "--no-lower", "-o", "out")
    assert (workplace / "out" / "model.safetensors").is_file()


def main_quietly(*arguments: str) -> None:
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code in (0, None)


def test_every_yaml_recipe_in_the_guide_runs(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _, text in blocks(ROOT / "docs" / "guide.md", "yaml"):
        (workplace / "recipe.yaml").write_text(text)
        main_quietly("run", "recipe.yaml", "-o", "run")
        assert "The fused model" in capsys.readouterr().out


def test_examples_are_recipes() -> None:
    from zoo.pipeline.recipes import read_recipe

    for recipe in ROOT.glob("examples/*.yaml"):
        assert read_recipe(recipe).fuse.strategy
        assert yaml.safe_load(recipe.read_text())


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for _, text in blocks(page, "console"):
            assert set(re.findall(r"^make (\w+)", text, re.MULTILINE)) <= targets


def test_hooks_in_the_docs_have_their_exact_signatures() -> None:
    import inspect

    from zoo import hookspecs

    page = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    hooks = [(name, function) for name, function in vars(hookspecs).items()
             if name.startswith("zoo_")]
    assert hooks
    for name, function in hooks:
        assert f"`{name}{inspect.signature(function)}`".replace("'", "") in page


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"

